"""A results folder is left alone that leads to another one: nothing there is written or removed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze, merge
from retrace.analyze.replay.parts import PARTS
from retrace.analyze.tables.saved import SAVED
from retrace.traces import RetraceError, Trace, create_trace
from retrace.traces.storage.durable import within

MakeTrace = Callable[..., Trace]
NAMES = ["plots", PARTS, SAVED]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder of somebody else, with files of names that results have."""
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("recall-by-layer.png", "by-position.png", "metrics.parquet", "notes"):
        (folder / name).write_text("mine")
    return folder


def untouched(folder: Path) -> bool:
    names = {"recall-by-layer.png", "by-position.png", "metrics.parquet", "notes"}
    there = list(folder.iterdir())
    return {file.name for file in there} == names and all(f.read_text() == "mine" for f in there)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_results(
    make_trace: MakeTrace, rules: Any, tmp_path: Path, other: Path, name: str, overwrite: bool
) -> None:
    trace, out = make_trace(rules()), tmp_path / "r"
    analyze(trace, ["window"], [2], out=out, keep_exact=False, workers=1)
    (out / name).symlink_to(other, target_is_directory=True)
    with pytest.raises(RetraceError, match=f"{name} is a link"):
        analyze(trace, ["exact"], [2], out=out, overwrite=overwrite, keep_exact=False, workers=1)
    assert untouched(other)


def test_of_parts(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    """The parts of another folder are not those of this one, to be removed when they are merged."""
    trace, ours, theirs = make_trace(rules()), tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        analyze(trace, ["window"], [2], out=folder, part=(1, 1), keep_exact=False, workers=1)
    (parts,) = (ours / PARTS).iterdir()
    for file in parts.iterdir():
        file.unlink()
    parts.rmdir()
    parts.symlink_to(theirs / PARTS / parts.name, target_is_directory=True)
    for begin in (
        lambda: merge([ours]),
        lambda: analyze(trace, ["window"], [2], out=ours, keep_exact=False, workers=1),
    ):
        with pytest.raises(RetraceError, match="is a link"):
            begin()
    assert {"job.json"} < {file.name for file in (theirs / PARTS / parts.name).iterdir()}
    merge([theirs])


def test_pictures_that_are_folders_are_left(
    make_trace: MakeTrace, rules: Any, tmp_path: Path
) -> None:
    trace, out = make_trace(rules()), tmp_path / "r"
    analyze(trace, ["window"], [2], out=out, keep_exact=False, workers=1)
    (out / "plots" / "sweep-of-mine.png").mkdir(parents=True)
    (out / "plots" / "by-position.png").write_text("old")
    analyze(trace, ["exact"], [2], out=out, overwrite=True, keep_exact=False, workers=1)
    assert [file.name for file in (out / "plots").iterdir()] == ["sweep-of-mine.png"]


def test_of_a_trace_that_is_begun(tmp_path: Path, other: Path, rules: Any) -> None:
    """What is aside of a trace is emptied first."""
    (tmp_path / ".t.zarr.new").symlink_to(other, target_is_directory=True)
    writer = create_trace(
        tmp_path / "t.zarr",
        rules={0: rules()},
        tokens=[np.arange(3, dtype=np.int32)],
        query_positions=[np.arange(3, dtype=np.int32)],
        dtype="float32",
        attributes={},
    )
    writer.close()
    assert untouched(other)


def test_files_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("")
    with pytest.raises(RetraceError, match="plots is no folder"):
        within(tmp_path, "plots")
    assert within(tmp_path, "none") == tmp_path / "none"
