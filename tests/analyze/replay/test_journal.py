"""Finished tasks are appended to a journal: many small ones share a flush, and none is lost."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.analyze.storage import journal
from retrace.analyze.storage.journal import Journal, read_journals
from retrace.traces import Trace

MakeTrace = Callable[..., Trace]
RECORDS = {(0, s): {"a": np.arange(3.0) + s, "facts": np.array([s], np.uint8)} for s in range(4)}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The file of four records."""
    kept = Journal(tmp_path)
    for task, arrays in RECORDS.items():
        kept.append(task, arrays)
    (file,) = tmp_path.iterdir()
    return file


def read(folder: Path) -> list[tuple[int, int]]:
    """The tasks that are there, each with what was written."""
    found = list(read_journals(folder))
    for task, arrays in found:
        assert arrays.keys() == RECORDS[task].keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, RECORDS[task][name])
    return [task for task, _ in found]


def test_a_kill_costs_the_record_in_hand(written: Path) -> None:
    whole = written.read_bytes()
    record = len(whole) // len(RECORDS)
    for length in (0, 1, record - 1, record, record + 1, 2 * record + 40, len(whole) - 1):
        written.write_bytes(whole[:length])
        assert read(written.parent) == [*RECORDS][: length // record]


def test_what_is_damaged_is_left_out(written: Path) -> None:
    whole = bytearray(written.read_bytes())
    record = len(whole) // len(RECORDS)
    for at in range(record):
        changed = whole.copy()
        changed[record + at] ^= 1 << at % 8
        written.write_bytes(changed)
        tasks = read(written.parent)  # never as of another task, or with other numbers
        assert tasks[0] == (0, 0) and (0, 1) not in tasks
    assert tasks == [(0, 0), (0, 2), (0, 3)]  # the end of an archive: the next begins where it did


def test_what_claims_to_be_more_or_is_no_file(written: Path) -> None:
    length = journal.HEADER.pack(journal.MAGIC, 0, 3, 1 << 62)
    written.write_bytes(written.read_bytes() + length + bytes(50))
    os.mkfifo(written.with_name("pipe.journal"))
    written.with_name("folder.journal").mkdir()
    written.with_name("gone.journal").symlink_to(written.with_name("nowhere"))
    assert read(written.parent) == [*RECORDS]


def test_the_newer_counts(written: Path) -> None:
    Journal(written.parent).append((0, 2), {"a": np.zeros(1)})
    *_, (task, arrays) = read_journals(written.parent)
    assert task == (0, 2) and arrays["a"].tolist() == [0.0]


@pytest.mark.parametrize("seconds", [3600.0, 0.0])
def test_flushes_are_shared_by_small_tasks(
    make_trace: MakeTrace,
    rules: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flushed: list[Path],
    seconds: float,
) -> None:
    """What takes longer than a second is flushed each, as if every task did."""
    trace = make_trace(rules(), [16] * 40)
    monkeypatch.setattr(journal, "FLUSH_SECONDS", seconds)
    analyze(trace, ["window"], [2], min_context=4, out=tmp_path / "r", workers=1)
    kept = [path for path in flushed if ".journal" in path.name]
    # The first at once, and the others together at the end.
    assert len(kept) == (2 if seconds else 40)
    assert not [
        path for path in flushed if ".exact" in str(path)
    ]  # which are checked as they are read


def test_parts_of_a_whole_task_are_flushed(
    make_trace: MakeTrace, rules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for `merge` has no results that stand in for it."""
    trace, held = make_trace(rules(), [16] * 5), []
    fsync = os.fsync

    def looking(file: int) -> None:
        fsync(file)
        held.append(sum(f.stat().st_size for f in tmp_path.rglob("*.journal")))

    monkeypatch.setattr(os, "fsync", looking)
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 3600.0)
    analyze(trace, ["window"], [2], min_context=4, out=tmp_path / "r", workers=1, part=(1, 1))
    (file,) = tmp_path.rglob("*.journal")
    assert held[-1] == file.stat().st_size
