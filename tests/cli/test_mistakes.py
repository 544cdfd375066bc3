"""A user's mistake is a line that names cause and cure, and exit code 2; never a traceback."""

import errno
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]


def error(result: Result) -> str:
    """The line of a mistake; there must be one, the hint, and nothing on stdout."""
    assert not result.stdout
    assert "--help' for help." in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stderr.endswith(f"{line}\n")
    return line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "qest"], ["'qest'", "Did you mean quest?"]),
        (["--method", "quest:pag=3"], ["'pag'", "Did you mean page?"]),
        (["--method", "quest:page=x"], ["page='x'", "expected int"]),
        (["--method", "nowhere.py:Mine"], ["no file nowhere.py"]),
        (["--topk", "0"], ["top-k 0", "1 or more"]),
        (["--topk", "500"], ["top-k 500", "129", "--min-context"]),
        (["--topk", "5-1"], ["'5-1'", "ends before it begins"]),
        (["--topk", "many"], ["'many'", "0,2,5-8"]),
        (["--layers", "7"], ["no layer 7", "0 to 2"]),
        (["--protocol", "some"], ["'some'", "prefix:POSITION"]),
        (["--device", "abacus"], ["abacus"]),
        (["--tokp", "5"], ["--topk"]),
    ],
)
def test_of_analyze(run: Run, trace: Path, arguments: list[str], words: list[str]) -> None:
    line = error(run("analyze", trace, *arguments, code=2))
    for word in words:
        assert word in line


def test_a_budget_too_large_beside_one_that_is_not(run: Run, trace: Path) -> None:
    options = ("--topk", "5,500", "--no-plots", "--format")
    result = run("analyze", trace, *options, "json")
    assert "No query counts for top-k 500" in result.stderr
    assert {row["topk"] for row in json.loads(result.stdout)} == {5}
    assert "top-k 5\n" in run("analyze", trace, *options, "markdown").stdout


def test_no_trace_there(run: Run, place: Path) -> None:
    assert "no trace at nothing" in error(run("analyze", "nothing", code=2))
    assert "no trace at nothing" in error(run("info", "nothing", code=2))
    assert "no folder nothing" in error(run("traces", "nothing", code=2))


def test_no_trace_here(run: Run, place: Path) -> None:
    assert "retrace capture" in error(run("analyze", code=2))


def test_a_folder_that_is_no_trace(run: Run, place: Path) -> None:
    (place / "folder").mkdir()
    assert "not a trace" in error(run("analyze", "folder", code=2))


def test_a_newer_format(run: Run, trace: Path) -> None:
    metadata = json.loads((trace / "zarr.json").read_text())
    metadata["attributes"]["retrace_format"] = 99
    (trace / "zarr.json").write_text(json.dumps(metadata))
    line = error(run("analyze", trace, code=2))
    assert "format 99" in line and "pip install -U" in line


def test_a_trace_with_nothing_finished(run: Run, new_trace: Callable[..., None]) -> None:
    new_trace(Path("t.zarr"), finished=0)
    assert "--resume" in error(run("analyze", "t.zarr", code=2))


@pytest.mark.parametrize("spoilt", ["run.json", "metrics.parquet"])
def test_a_spoilt_results_folder(run: Run, trace: Path, spoilt: str) -> None:
    run("analyze", trace, "--topk", "5", "--no-plots")
    Path("results/tiny", spoilt).write_text("spoilt")
    assert "--overwrite" in error(run("analyze", trace, "--topk", "5", code=2))


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval-harness's own tasks, which take ten seconds to read: its tests read them."""
    if importlib.util.find_spec("lm_eval") is None:
        return
    tasks = importlib.import_module("lm_eval.tasks")
    manager = tasks.TaskManager
    monkeypatch.setattr(
        tasks, "TaskManager", lambda **options: manager(**options | {"include_defaults": False})
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "wikitext"], ["--pretrained"]),
        (["--pretrained", "x"], ["task", "--text"]),
        (["--pretrained", "x", "--tasks", "wikitxt"], ["Did you mean", "wikitext"]),
        (["--pretrained", "x", "--text", "nowhere.txt"], ["no text file nowhere.txt"]),
        (["--pretrained", "x", "--tasks", "wikitext", "--limit", "0"], ["limit", "at least 1"]),
        (["--pretrained", "x", "--tasks", "wikitext", "--dtype", "int3"], ["dtype", "bfloat16"]),
    ],
)
def test_of_capture(
    run: Run, place: Path, few_tasks: None, arguments: list[str], words: list[str]
) -> None:
    line = error(run("capture", *arguments, code=2))
    for word in words:
        assert word in line


def test_an_unknown_method_is_no_page(run: Run) -> None:
    assert "Did you mean quest?" in error(run("methods", "qest", code=2))


def test_a_full_disk(run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "results/tiny/metrics.parquet")

    monkeypatch.setattr("retrace.analyze.results.Results.save", full)
    line = error(run("analyze", trace, "--topk", "5", code=2))
    assert "disk is full" in line and "metrics.parquet" in line


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_that_is_not_ours(
    run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(number, os.strerror(number), "results/tiny/.parts")

    monkeypatch.setattr("retrace.analyze.results.Results.save", refused)
    line = error(run("analyze", trace, "--topk", "5", code=2))
    assert f"results/tiny/.parts: {os.strerror(number)}" in line and "--out" in line


def test_another_error_is_a_bug(run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("ours")

    monkeypatch.setattr("retrace.analyze.results.Results.save", broken)
    with pytest.raises(ValueError, match="ours"):
        run("analyze", trace, "--topk", "5")


@pytest.mark.parametrize(
    ("command", "function", "cure"),
    [
        (["capture", "--pretrained", "x"], "retrace.capture.capture", "--resume"),
        (["analyze", "traces/tiny.zarr"], "retrace.analyze.analyze", "same command"),
    ],
)
def test_interrupted(
    run: Run,
    trace: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    function: str,
    cure: str,
) -> None:
    def interrupt(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupt)
    result = run(*command, code=130)
    assert "Interrupted." in result.stderr and cure in result.stderr
    assert not result.stdout
