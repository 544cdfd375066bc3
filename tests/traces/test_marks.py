"""Named spans of positions: as they were written, told by their presence, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from retrace.traces import (
    DamageError,
    RetraceError,
    create_trace,
    joined_spans,
    open_trace,
    resume_trace,
    verify_trace,
)
from retrace.traces.storage.shards import write_rows

LENGTHS = (9, 1, 14)
MARKS = [
    {"question": [range(7, 9)], "evidence": [range(0, 2), range(3, 4)]},
    {},
    {"evidence": [range(13, 14)], "answer": [], "needle-2": [range(0, 14)]},
]

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, make_plan: Callable[..., Any]) -> Write:
    """Writes a whole trace of finite numbers with marks; returns where it is."""

    def make(name: str = "t.zarr", bundle: int = 1, marks: Any = MARKS) -> Path:
        plan = make_plan(lengths=LENGTHS)
        for tensors in plan.tensors.values():
            for tensor in tensors:
                tensor[:] = 0.5
        writer = create_trace(tmp_path / name, **plan.arguments, marks=marks, bundle=bundle)
        plan.fill(writer, range(3))
        writer.close()
        return tmp_path / name

    return make


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("bundle", [1, 2])
def test_round_trip(write: Write, bundle: int) -> None:
    trace = open_trace(write(bundle=bundle))
    assert trace.marks(0) == {"question": (range(7, 9),), "evidence": (range(0, 2), range(3, 4))}
    assert trace.marks(1) == {}
    assert trace.marks(2) == {"evidence": (range(13, 14),), "needle-2": (range(0, 14),)}
    assert trace.mark_names == ("question", "evidence", "needle-2")
    assert verify_trace(trace).whole
    array = zarr.open_array(trace.path / "marks")
    assert array.chunks == (bundle, 3, 3)
    assert array[2].tolist() == [[1, 13, 14], [2, 0, 14], [-1, -1, -1]]


@pytest.mark.parametrize("marks", [None, [{}, {}, {"evidence": []}]])
def test_a_trace_without_marks_is_the_same_as_ever(write: Write, marks: Any) -> None:
    path = write(marks=marks)
    assert not (path / "marks").exists()
    trace = open_trace(path)
    assert (trace.marks(0), trace.mark_names) == ({}, ())
    marked = write("marked.zarr")
    assert trace.digest(0) != open_trace(marked).digest(0)
    assert trace.digest(1) == open_trace(marked).digest(1)  # which has none
    shutil.rmtree(marked / "marks")
    # Consolidated metadata are written when the trace is finished, and name all arrays.
    ours, theirs = files(path), files(marked)
    del ours["zarr.json"], theirs["zarr.json"]
    assert ours == theirs


def test_other_marks_are_not_resumed(write: Write, make_plan: Callable[..., Any]) -> None:
    path, plan = write(), make_plan(lengths=LENGTHS).arguments
    resume_trace(path, **plan, marks=MARKS)
    for marks in (None, [*MARKS[:2], {"evidence": [range(12, 14)]}]):
        with pytest.raises(RetraceError, match="with other marks"):
            resume_trace(path, **plan, marks=marks)
    with pytest.raises(RetraceError, match="with other marks"):
        resume_trace(write("plain.zarr", marks=None), **plan, marks=MARKS)


@pytest.mark.parametrize(
    ("marks", "refusal"),
    [
        ({"evidence": [range(3, 3)]}, "spans ascend"),
        ({"evidence": [range(3, 10)]}, "end by 9"),
        ({"evidence": [range(3, 5), range(4, 6)]}, "do not overlap"),
        ({"evidence": [range(-1, 2)]}, "spans ascend"),
        ({"evi dence": [range(3, 5)]}, "no name of a mark"),
        ({"": [range(3, 5)]}, "no name of a mark"),
    ],
)
def test_marks_that_cannot_be(write: Write, marks: Any, refusal: str) -> None:
    with pytest.raises(RetraceError, match=refusal):
        write(marks=[marks, {}, {}])
    assert not list(write("whole.zarr").parent.glob("t.zarr*"))


def test_joined_spans() -> None:
    assert joined_spans([range(4, 4)]) == ()
    assert joined_spans([range(2, 9), range(3, 4), range(0, 1)]) == (range(0, 1), range(2, 9))


@pytest.mark.parametrize(
    "row",
    [
        [[5, 0, 2]],
        [[0, 8, 12]],
        [[0, 5, 5]],
        [[0, 3, 5], [0, 4, 6]],
        [[-1, 0, 2]],
        [[-1, -1, -1], [0, 0, 2]],
        [[0, -(2**31), 2**31 - 1]],
    ],
)
@pytest.mark.parametrize("bundle", [1, 2])
def test_rows_that_anybody_may_have_written(write: Write, bundle: int, row: Any) -> None:
    path = write(bundle=bundle)
    rows = np.full((bundle, 3, 3), -1, np.int32)
    rows[0, : len(row)] = row
    write_rows(zarr.open_array(path / "marks", mode="r+"), 0, rows)
    with pytest.raises(DamageError, match="marks of sequence 0 is damaged") as refusal:
        open_trace(path).marks(0)
    assert "\n" not in str(refusal.value)
    assert open_trace(path).marks(1) == {}
    assert [(d.tensor, d.sequence) for d in verify_trace(path).damages] == [("marks", 0)]


@pytest.mark.parametrize("names", [None, [], "evidence", [1, 2, 3], ["a", "a", "b"], ["a\nb"]])
def test_names_that_anybody_may_have_written(write: Write, names: Any) -> None:
    path = write()
    metadata = json.loads((path / "marks/zarr.json").read_text())
    metadata["attributes"]["names"] = names
    (path / "marks/zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(DamageError, match="marks") as refusal:
        open_trace(path).marks(0)
    assert "\n" not in str(refusal.value)
    assert not verify_trace(path).whole


def test_marks_that_are_gone(write: Write) -> None:
    path = write()
    shutil.rmtree(path / "marks/c/1")
    with pytest.raises(DamageError, match="missing"):
        open_trace(path).marks(1)
    assert open_trace(path).marks(2)
    shutil.rmtree(path / "marks")
    assert [d.tensor for d in verify_trace(path).damages] == ["marks"]
