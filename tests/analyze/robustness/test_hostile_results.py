"""A results folder is data that anybody may have changed, and that a killed process may leave."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrace.analyze import Results, analyze, merge
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
TABLES = (
    "metrics.parquet",
    "curves.parquet",
    "sequences.parquet",
    "positions.parquet",
    "head_patterns.parquet",
    "locality.parquet",
    "tails.parquet",
    "projected.parquet",
)
FILES = (*TABLES, "run.json", "table.md")
MOVES = 1 + len(FILES)
"""Of what is saved, into its place: one of the folder, then the files."""


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    """A small one."""
    return make_trace(rules(), [40, 30])


@pytest.fixture
def folder(trace: Trace, tmp_path: Path) -> Path:
    """Results of it."""
    analyze(trace, ["exact"], [2], out=tmp_path / "r", keep_exact=False, workers=1)
    return tmp_path / "r"


@settings(max_examples=60)
@given(data=st.data())
def test_tables_that_were_changed(folder: Path, data: st.DataObject) -> None:
    file = folder / data.draw(st.sampled_from(TABLES))
    before = file.read_bytes()
    held = bytearray(before)
    at = data.draw(st.integers(0, len(held) - 1))
    if data.draw(st.booleans()):
        held[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del held[at:]
    file.write_bytes(held)
    with pytest.raises(RetraceError, match=f"{file.name} is not what was written"):
        Results.load(folder)
    file.write_bytes(before)


THINGS = st.sampled_from([None, -1, 10**30, "", "../../x", [], {}, [1], {"a": 1}, 1e308])


@settings(max_examples=60)
@given(data=st.data())
def test_facts_that_were_changed(folder: Path, data: st.DataObject) -> None:
    before = (folder / "run.json").read_text()
    run = json.loads(before)
    name = data.draw(st.sampled_from(sorted(run)))
    if data.draw(st.booleans()):
        del run[name]
    else:
        run[name] = data.draw(THINGS)
    (folder / "run.json").write_text(json.dumps(run))
    try:
        assert Results.load(folder).methods() == ["exact"]
    except RetraceError as error:
        assert "\n" not in str(error)
    (folder / "run.json").write_text(before)


@pytest.mark.parametrize("raw", [b"", b"[" * 200_000, b"\xff\xfe", b"[]", b"9" * 10_000])
def test_facts_that_are_none(folder: Path, raw: bytes) -> None:
    (folder / "run.json").write_bytes(raw)
    with pytest.raises(RetraceError, match="is not a results folder"):
        Results.load(folder)


@pytest.mark.parametrize("name", FILES[:6])
def test_what_leads_out_of_the_folder_or_never_ends(folder: Path, name: str) -> None:
    elsewhere = folder.parent / name
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(RetraceError, match=f"its {name} leads out of it"):
        Results.load(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(RetraceError, match=f"its {name} is no file"):
        Results.load(folder)


class Killed(BaseException):
    """Stands for the end of a process."""


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    found = Results.load(folder)
    names = ("metrics", "sequences", "positions")
    return {name: getattr(found, name) for name in names}


@pytest.mark.parametrize("moment", range(MOVES + 1))
def test_killed_while_it_saves(
    trace: Trace, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """All of the new results or all of the old, and the same call comes to the end."""
    once = folder.parent / "once"
    shutil.copytree(folder, once)

    def run(out: Path) -> Results:
        return analyze(trace, ["exact", "window"], [2], out=out, keep_exact=False, workers=1)

    run(once)
    calls = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def move(path: Path, target: Path) -> Any:
            nonlocal calls
            if folder == path.parent or (folder == path.parent.parent and path.suffix != ".npz"):
                if calls == moment:
                    raise Killed
                calls += 1
            return real(path, target)

        return move

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        try:
            run(folder)
        except Killed:
            assert moment < MOVES
        else:
            assert moment == MOVES
    left = Results.load(folder)
    assert set(left.run["methods"]) == set(left.methods())
    assert set(left.methods()) in ({"exact"}, {"exact", "window"})
    run(folder)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    for name, frame in tables(once).items():
        pd.testing.assert_frame_equal(tables(folder)[name], frame)
        assert np.isfinite(frame["mean"]).any()


def test_killed_while_it_saves_for_the_first_time(trace: Trace, folder: Path) -> None:
    (folder / ".saving").mkdir()
    for name in FILES:
        (folder / name).rename(folder / ".saving" / name)
    (folder / ".saving" / "run.json").write_text("{")
    analyze(trace, ["exact"], [2], out=folder, keep_exact=False, workers=1)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("later", [["exact", "window"], ["exact"], ["exact", "quest"]])
@pytest.mark.parametrize("removed", [0, 1])
def test_parts_of_a_run_killed_when_it_had_saved(
    trace: Trace, folder: Path, monkeypatch: pytest.MonkeyPatch, later: list[str], removed: int
) -> None:
    """Whatever the next run is asked for, it removes them, and none of a run that is not over."""

    def dying(path: Path, **options: Any) -> None:
        if path.parent.name != ".parts" or not path.exists():
            return
        for file in sorted(path.iterdir(), reverse=True)[:removed]:
            file.unlink()
        raise Killed

    def run(methods: list[str], **options: Any) -> Results:
        return analyze(trace, methods, [2], out=folder, keep_exact=False, workers=1, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", dying)
        run(["window"])
    run(["sparq"], part=(1, 2))
    assert len(list((folder / ".parts").iterdir())) == 2
    run(later)
    (unfinished,) = (folder / ".parts").iterdir()
    assert "sparq" in (unfinished / "job.json").read_text()
    run(["sparq"], part=(2, 2))
    assert "sparq" in merge([folder]).methods()
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)


def test_a_merge_killed_when_it_had_saved(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders, start=1):
        analyze(trace, ["exact"], [2], out=folder, part=(i, 2), keep_exact=False, workers=1)
    remove, removals = shutil.rmtree, 0

    def dying(path: Path, **options: Any) -> None:
        nonlocal removals
        removals += path.parent.name == ".parts"
        if removals == 2:
            raise Killed
        remove(path, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", dying)
        merge(folders)
    assert merge(folders).methods() == ["exact"]
    assert sorted(p.name for p in folders[0].iterdir()) == sorted(FILES)
    assert not any(folders[1].iterdir())
