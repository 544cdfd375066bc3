"""Two runs never write one results folder at a time, and no run writes where it should not."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrace.analyze import Results, analyze, merge
from retrace.traces import RetraceError, Trace
from retrace.traces.storage.lock import locked_folder

MakeTrace = Callable[..., Trace]


def test_a_second_run_is_refused(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    trace, out = make_trace(rules()), tmp_path / "r"
    with locked_folder(out):
        for change in ({}, {"overwrite": True}, {"again": True}):
            with pytest.raises(RetraceError, match=r"Another run is writing .*r: wait for it"):
                analyze(trace, topk=[2], out=out, keep_exact=False, **change)
        with pytest.raises(RetraceError, match="Another run is writing"):
            merge([out])
    assert not out.exists()
    analyze(trace, topk=[2], out=out, keep_exact=False)
    assert {path.name for path in out.iterdir()} == {
        "metrics.parquet", "curves.parquet", "sequences.parquet", "positions.parquet",
        "head_patterns.parquet", "locality.parquet", "tails.parquet", "projected.parquet",
        "run.json",
        "table.md",
    }  # fmt: skip


def test_runs_after_each_other_lose_nothing(
    make_trace: MakeTrace, rules: Any, tmp_path: Path
) -> None:
    trace, out = make_trace(rules()), tmp_path / "r"
    refused = []

    def run(method: str) -> None:
        while True:
            try:
                analyze(trace, [method], [2], out=out, keep_exact=False)
                return
            except RetraceError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=run, args=(name,)) for name in ("exact", "random")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(Results.load(out).methods()) == {"exact", "random"}
    assert all("Another run is writing" in line for line in refused)


def test_parts_share_a_folder(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    trace, out = make_trace([rules(), rules()]), tmp_path / "r"
    with locked_folder(out, shared=True):
        for i in (1, 2):
            analyze(trace, topk=[2], out=out, keep_exact=False, part=(i, 2))
    assert merge([out]).methods() == ["exact"]


def test_what_is_there_is_read_without_leave_to_write(
    make_trace: MakeTrace, rules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, out = make_trace(rules()), tmp_path / "r"
    first = analyze(trace, topk=[2], out=out, keep_exact=False)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("retrace.traces.storage.lock.FileLock.acquire", refuse)
    assert analyze(trace, topk=[2], out=out, keep_exact=False).run == first.run
    with pytest.raises(RetraceError, match=r"r cannot be written \(Permission denied\)"):
        analyze(trace, topk=[2, 3], out=out, keep_exact=False)


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda place: place.write_text(""), "it is a file, or below one"),
        (lambda place: place.symlink_to(place.with_name("gone")), "a link to what is not there"),
    ],
)
def test_what_can_be_no_folder(
    make_trace: MakeTrace, rules: Any, tmp_path: Path, make: Callable[[Path], Any], cause: str
) -> None:
    make(tmp_path / "r")
    for out in (tmp_path / "r", tmp_path / "r" / "below"):
        with pytest.raises(RetraceError, match="cannot be written") as caught:
            analyze(make_trace(rules()), topk=[2], out=out, keep_exact=False)
    assert cause in str(caught.value) or out.name == "below"
    with pytest.raises(RetraceError, match="File name too long"):
        analyze(make_trace(rules()), topk=[2], out=tmp_path / ("x" * 300), keep_exact=False)


def test_overwriting_spares_what_is_not_of_retrace(
    make_trace: MakeTrace, rules: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "run.json").write_text("mine")
    for overwrite in (True, False):
        with pytest.raises(RetraceError, match="is not empty, and no results folder of retrace"):
            analyze(
                make_trace(rules()), topk=[2], out=folder, keep_exact=False, overwrite=overwrite
            )
    assert (folder / "run.json").read_text() == "mine"
