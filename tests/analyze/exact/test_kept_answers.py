"""Exact answers kept beside the trace for later runs."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import analyze
from retrace.traces import Trace, open_trace

pytestmark = pytest.mark.usefixtures("untried")
MakeTrace = Callable[..., Trace]
METHODS = ["exact", "quest:page=4", "loki:basis=own", "sparq"]


def kept_files(trace: Trace) -> list[Path]:
    """The files of kept answers."""
    folder = trace.path.with_name(f"{trace.path.stem}.exact")
    return sorted(p for p in folder.rglob("*") if p.is_file())


def run(trace: Trace, keep_exact: bool = True, topk: tuple[int, ...] = (2, 5)) -> pd.DataFrame:
    """Figures of several methods."""
    results = analyze(trace, METHODS, topk, min_context=0, keep_exact=keep_exact)
    return pd.concat([results.metrics, results.curves], ignore_index=True)


def assert_equal(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "changes",
    [{}, {"heads": 4, "kv_heads": 1, "value_dim": 5}, {"window": 9, "softcap": 3.0}],
    ids=str,
)
def test_same_figures(make_trace: MakeTrace, rules: Any, changes: dict[str, Any]) -> None:
    trace = make_trace(rules(**changes), name="own")
    without = run(trace, keep_exact=False)
    assert not trace.path.with_name("own.exact").exists()
    writing, reading = run(trace), run(trace)
    assert len(kept_files(trace)) >= 3
    assert_equal(writing, without)
    assert_equal(reading, without)


def test_answers_are_used(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), name="own")
    run(trace)
    before = {p: p.stat().st_mtime_ns for p in kept_files(trace)}
    run(trace)
    assert {p: p.stat().st_mtime_ns for p in kept_files(trace)} == before


def test_a_larger_budget(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), [300, 40], queries=[range(290, 300), range(40)], name="own")
    run(trace, topk=(2,))
    assert_equal(run(trace, topk=(2, 200)), run(trace, keep_exact=False, topk=(2, 200)))


def test_answers_hold_queries_that_did_not_count(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), name="own")
    analyze(trace, topk=[5])  # from position 50 on
    assert_equal(run(trace), run(trace, keep_exact=False))


@pytest.mark.parametrize("damage", ["cut short", "empty", "overwritten", "deleted"])
def test_damaged_answers_are_computed_anew(make_trace: MakeTrace, rules: Any, damage: str) -> None:
    trace = make_trace(rules(), name="own")
    wanted = run(trace)
    for path in kept_files(trace):
        whole = path.read_bytes()
        if damage == "cut short":
            path.write_bytes(whole[: len(whole) * 2 // 3])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "overwritten":
            middle = len(whole) // 2
            path.write_bytes(whole[:middle] + b"\xff" * 40 + whole[middle + 40 :])
        else:
            path.unlink()
    assert_equal(run(trace), wanted)
    assert_equal(run(trace), wanted)


def test_a_folder_that_takes_no_more(
    make_trace: MakeTrace,
    rules: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused(path: Path, arrays: Any, *, flush: bool) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    trace = make_trace(rules(), name="own")
    wanted = run(trace)
    first, *others = kept_files(trace)
    first.unlink()
    monkeypatch.setattr("retrace.analyze.exact.store.write_arrays", refused)
    assert_equal(run(trace), wanted)
    assert caplog.messages == [
        f"Exact answers are not kept in {trace.path.with_name('own.exact')} for later runs: "
        "Read-only file system."
    ]
    assert kept_files(trace) == others


def test_another_capture_of_the_same_name(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), name="own", seed=1)
    first = run(trace)
    shutil.rmtree(trace.path)
    again = make_trace(rules(), name="own", seed=2)
    assert again.path == trace.path
    second = run(again)
    assert_equal(second, run(again, keep_exact=False))
    assert not np.allclose(first["mean"], second["mean"], equal_nan=True)


def test_a_renamed_trace_keeps_its_figures(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), name="own")
    wanted = run(trace)
    moved = trace.path.with_name("moved.zarr")
    trace.path.rename(moved)
    assert_equal(run(open_trace(moved)), wanted)


def test_kept_answers_change_no_bit(
    make_trace: MakeTrace, rules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on a grid, where products are exact in whatever order they are summed."""
    monkeypatch.setattr("retrace.analyze.units.unit.CPU_SCORES", 1 << 13)  # several blocks
    draw = np.random.default_rng(0).normal
    lengths = (131, 90)
    tensors = {
        (layer, s): tuple(draw(size=(heads, length, 20)) for heads in (4, 2, 2))
        for layer in range(2)
        for s, length in enumerate(lengths)
    }
    layers = [
        rules(heads=4, kv_heads=2, key_dim=20, value_dim=20, **own)
        for own in ({}, {"softcap": 3.0, "sinks": (0.5, -1.0, 0.0, 2.0), "window": 60})
    ]
    trace = make_trace(layers, lengths, tensors=tensors, name="own")
    methods = [*METHODS, "oracle-sample", "vattention", "twilight", "quest:page=4,pool=layer-sum"]
    tables = []
    for name, keep in (("fresh", True), ("kept", True), ("without", False)):
        analyze(trace, methods, [3, 9], out=tmp_path / name, keep_exact=keep, workers=1)
        tables.append((tmp_path / name / "metrics.parquet").read_bytes())
    assert kept_files(trace)
    assert tables[0] == tables[1] == tables[2]
