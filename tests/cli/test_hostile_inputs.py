"""Traces and results that others wrote or changed: each command reads them, or says in one line
what is wrong with them."""

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from retrace.cli.main import main

Run = Callable[..., Result]
Change = Callable[[st.DataObject], None]
GONE = object()
THINGS = st.sampled_from(
    [GONE, None, True, -1, 0, 5, 10**30, 1e308, "", "x", "../../x", [], [1], ["a"], {}, {"a": 1}]
)
METHOD = {"method": "window", "topk": 4, "from_position": None, "dense_layers": [0]}
CAPTURED = {
    "model": {"pretrained": "tiny", "revision": None, "parameters": 1234},
    "capture": {"max_length": 130, "layers": None, "queries": "all"},
    "tokenizer": {"starts_with_bos": False},
    "batch_size": 1,
    "created": "2026-01-01",
}
"""What `retrace capture` writes besides."""


def answer(*arguments: str | Path) -> Result:
    """What a command says: no traceback, and of a mistake one line."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="retrace")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2)
    if result.exit_code == 2:
        [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert result.stderr.endswith(f"{line}\n")
    return result


def places(held: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in JSON, however deep."""
    inside = held.items() if isinstance(held, dict) else enumerate(held)
    for key, value in inside:
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from places(value, (*before, key))


def change(held: Any, data: st.DataObject) -> None:
    """Put something else in one place of JSON, or nothing."""
    *path, last = data.draw(st.sampled_from(list(places(held))))
    for key in path:
        held = held[key]
    thing = data.draw(THINGS)
    if thing is GONE:
        del held[last]
    else:
        held[last] = thing


def copy_of(folder: Path, name: str) -> Path:
    """The folder as it was, under another name."""
    shutil.rmtree(name, ignore_errors=True)
    return Path(shutil.copytree(folder, name))


@pytest.fixture
def looped(trace: Path) -> Path:
    """Two traces as though captured: the exact one, and this one with a method in the loop."""
    for place, more in ((trace, {}), (copy_of(trace, "looped.zarr"), {"calibration": []})):
        file = place / "zarr.json"
        metadata = json.loads(file.read_text())
        held = metadata["attributes"] | json.loads(json.dumps(CAPTURED))
        if more:
            held["capture"]["approximation"] = METHOD | more
        file.write_text(json.dumps(metadata | {"attributes": held}))
    return Path("looped.zarr")


READERS = [
    ("info", "x.zarr"),
    ("info", "x.zarr", "--format", "json"),
    ("traces", "."),
    ("verify", "x.zarr"),
    ("analyze", "x.zarr", "--topk", "4", "--dry-run"),
    ("export", "x.zarr", "--format", "numpy", "--layers", "0", "--kv-heads", "0"),
    ("compare", "x.zarr", "looped.zarr", "--layers", "0", "--no-plots"),
    ("compare", "traces/tiny.zarr", "x.zarr", "--layers", "0", "--no-plots"),
]


@pytest.mark.parametrize("command", READERS, ids=[" ".join(command[:2]) for command in READERS])
@settings(max_examples=12)
@given(data=st.data())
def test_attributes(
    trace: Path, looped: Path, command: tuple[str, ...], data: st.DataObject
) -> None:
    spoilt = copy_of(looped if str(trace) in command else trace, "x.zarr")
    metadata = json.loads((spoilt / "zarr.json").read_text())
    change(metadata["attributes"], data)
    (spoilt / "zarr.json").write_text(json.dumps(metadata))
    answer(*command)


@pytest.mark.parametrize("command", READERS, ids=[" ".join(command[:2]) for command in READERS])
def test_arrays_that_are_missing(trace: Path, looped: Path, command: tuple[str, ...]) -> None:
    for name in ("tokens", "nll", "length", "done", "query_positions", "layers", "layers/0/key"):
        spoilt = copy_of(looped if str(trace) in command else trace, "x.zarr")
        shutil.rmtree(spoilt / name)
        answer(*command)


@pytest.mark.parametrize(
    "command",
    [
        ("recommend", "x.zarr", "--target", "recall=0.1", "--method", "exact", "--topk", "4"),
        ("calibrate", "x.zarr", "loki"),
        ("analyze", "x.zarr", "--method", "window", "--topk", "4", "--no-plots", "--skip-damaged"),
        ("evaluate", "x.zarr", "--method", "window", "--topk", "4"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("name", ["layers/1/value", "query_positions"])
def test_arrays_that_longer_work_misses(
    trace: Path, looped: Path, command: tuple[str, ...], name: str
) -> None:
    shutil.rmtree(copy_of(trace, "x.zarr") / name)
    assert answer(*command).exit_code in (1, 2)


EVALUATE = ("evaluate", "traces/tiny.zarr", "--method", "window", "--topk", "4")
CAPTURE = ("capture", "--reference", "traces/tiny.zarr", "--approximate", "window", "--topk", "4")


@pytest.mark.parametrize(
    ("command", "attribute"),
    [
        (EVALUATE, "task"),
        (EVALUATE, "capture"),
        (EVALUATE, "tokenizer"),
        (CAPTURE, "model"),
        (CAPTURE, "batch_size"),
    ],
)
def test_what_only_a_capture_notes(
    trace: Path, looped: Path, command: tuple[str, ...], attribute: str
) -> None:
    metadata = json.loads((trace / "zarr.json").read_text())
    del metadata["attributes"][attribute]
    (trace / "zarr.json").write_text(json.dumps(metadata))
    said = answer(*command)
    assert said.exit_code == 2
    assert f"has no attribute {attribute}" in said.stderr


def test_compare_with_what_was_not_captured(run: Run, trace: Path) -> None:
    assert "has no method in the loop" in run("compare", trace, trace, code=2).stderr


@pytest.fixture
def results(run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of three methods."""
    # Two megabytes, which take the time of ten examples.
    page = importlib.import_module("retrace.analyze.outputs.report.page")
    monkeypatch.setattr(page, "_plotting_library", lambda: "")
    # Nor is a method what may be spoilt here.
    monkeypatch.setattr("retrace.analyze.replay.trials.Trials.check", lambda self, method: None)
    options = ("--method", "exact", "--method", "quest:page={2,4}", "--topk", "2,5", "--no-plots")
    run("analyze", trace, *options, "--out", "whole", "--workers", "1")
    return Path("whole")


READ = [
    ("report", "x", "--out", "x.html"),
    ("analyze", "traces/tiny.zarr", "--topk", "2", "--no-plots", "--out", "x"),
]


@pytest.mark.parametrize("command", READ, ids=lambda command: command[0])
@settings(max_examples=15)
@given(data=st.data())
def test_facts_of_results(results: Path, command: tuple[str, ...], data: st.DataObject) -> None:
    spoilt = copy_of(results, "x")
    facts = json.loads((spoilt / "run.json").read_text())
    change(facts, data)
    (spoilt / "run.json").write_text(json.dumps(facts))
    answer(*command)


COLUMNS = ["method", "layer", "module", "head", "topk", "metric", "mean", "std", "count"]


@pytest.mark.parametrize("command", READ, ids=lambda command: command[0])
@settings(max_examples=15)
@given(
    name=st.sampled_from(["metrics", "curves", "sequences", "positions", "head_patterns"]),
    column=st.sampled_from([*COLUMNS, "sequence", "axis", "first", "protocol", "pattern", "best"]),
    thing=st.sampled_from([GONE, None, "x", -1, 5, 2**60, 0.5, float("nan")]),
)
def test_tables_of_results(
    results: Path, command: tuple[str, ...], name: str, column: str, thing: Any
) -> None:
    """Tables that were written anew, with the digest that they then have."""
    file = copy_of(results, "x") / f"{name}.parquet"
    table = pd.read_parquet(file)
    table = table.drop(columns=column, errors="ignore") if thing is GONE else table
    if thing is not GONE:
        table[column] = thing
    table.to_parquet(file, index=False)
    facts = json.loads((file.parent / "run.json").read_text())
    facts["tables"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (file.parent / "run.json").write_text(json.dumps(facts))
    answer(*command)


@settings(max_examples=15)
@given(data=st.data())
def test_parts_of_a_run(run: Run, trace: Path, data: st.DataObject) -> None:
    if not Path("part").exists():
        run("analyze", trace, "--topk", "5", "--part", "1/2", "--out", "part", "--workers", "1")
    [job] = copy_of(Path("part"), "x").glob(".parts/*/job.json")
    facts = json.loads(job.read_text())
    change(facts, data)
    job.write_text(json.dumps(facts))
    assert answer("merge", "x").exit_code == 2
