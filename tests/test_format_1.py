"""What an earlier release wrote opens, and nothing of it is taken for what it is not.

`data/format-1` was written by its `write.py` with the code of an earlier commit.
"""

import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import Results, analyze, calibrate
from retrace.traces import open_trace, verify_trace

OLD = Path(__file__).parent / "data" / "format-1"
METHODS = ["exact", "quest:page=4", "loki:rank=2"]
FIGURES = {
    ("exact", 0, "recall"): 1.0,
    ("exact", 0, "attention_fraction"): 0.6130620,
    ("exact", 1, "error_norm"): 0.4979315,
    ("quest:page=4", 0, "recall"): 0.5875,
    ("quest:page=4", 1, "attention_fraction"): 0.9655420,
    ("loki:rank=2", 0, "error_norm"): 1.252675,
    ("loki:rank=2", 1, "recall"): 0.825,
}
"""Of head 1 at top-k 4, by method, layer and metric."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of all that was written."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def kept_bytes(folder: Path) -> dict[str, bytes]:
    """What is kept beside a trace, by file."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.npz")}


def figures(results: Results) -> "pd.Series[float]":
    """Means by method, layer, metric, head and budget."""
    by = ["method", "layer", "metric", "head", "topk"]
    return results.metrics.set_index(by)["mean"].sort_index()


def assert_as_written(results: Results) -> None:
    found = figures(results)
    for (method, layer, metric), figure in FIGURES.items():
        assert found[method, layer, metric, 1, 4] == pytest.approx(figure, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_traces(dtype: str) -> None:
    trace = open_trace(OLD / f"{dtype}.zarr")
    assert verify_trace(trace.path).whole
    assert trace.dtype.name == dtype
    assert [len(trace.tokens(sequence)) for sequence in trace.sequences] == [24, 17]
    rules = trace.layer(1).rules
    assert (rules.window, rules.softcap, rules.sinks) == (9, 8.0, (0.5, -1.0))
    key = trace.layer(0).key(0).astype(np.float32)
    assert key.shape == (1, 24, 4)
    assert key[0, :2].tolist() == [[-2.0, 0.25, 0.0, -0.25], [0.0, -0.75, -1.5, -0.25]]


def test_both_dtypes_hold_the_same_numbers() -> None:
    """All of them are quarters, which bfloat16 holds exactly."""
    one, other = (open_trace(OLD / f"{dtype}.zarr").layer(1) for dtype in ("float32", "bfloat16"))
    np.testing.assert_array_equal(one.value(1), other.value(1).astype(np.float32))


def test_results() -> None:
    results = Results.load(OLD / "float32-results")
    assert results.methods() == METHODS
    assert [results.topk(method) for method in METHODS] == [[2, 4]] * 3
    assert_as_written(results)
    assert not results.curves.empty and results.markdown()


def test_results_are_added_to(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The code has changed since: what it is not asked for stands, and is said to be older."""
    caplog.set_level(logging.INFO, "retrace")
    results = analyze(
        old / "float32.zarr", ["random"], [4], min_context=4, out=old / "float32-results"
    )
    assert "figures of other code than there is now: exact, quest:page=4, loki:rank=2." in (
        caplog.text
    )
    assert results.run["outdated"] == METHODS
    assert results.methods() == [*METHODS, "random"]
    assert_as_written(results)


def test_figures_are_computed_anew(old: Path) -> None:
    """Nothing has changed what these methods come to, so that old and new figures agree."""
    exact = kept_bytes(old / "float32.exact")
    settings = {"min_context": 4, "out": old / "float32-results"}
    results = analyze(old / "float32.zarr", METHODS, [2, 4], **settings)
    assert results.run["history"][1]["methods"] == {method: [2, 4] for method in METHODS}
    assert results.run["outdated"] == []
    assert_as_written(results)
    before = figures(Results.load(OLD / "float32-results"))
    # There are metrics now that there were not.
    pd.testing.assert_series_equal(figures(results).loc[before.index], before, rtol=1e-5, atol=1e-6)
    now = kept_bytes(old / "float32.exact")
    assert now.keys() == exact.keys()
    assert all(now[name] != exact[name] for name in exact)


def test_old_exact_answers_are_not_taken(old: Path) -> None:
    """Answers that would be told at once, if they were."""
    _spoil(old / "float32.exact")
    found = analyze(old / "float32.zarr", ["exact"], [4], min_context=4)
    none = analyze(old / "float32.zarr", ["exact"], [4], min_context=4, keep_exact=False)
    pd.testing.assert_series_equal(figures(found), figures(none))


def test_old_calibrations_are_not_taken(old: Path) -> None:
    """What is learned has a file of its own, beside those of other code."""
    before = kept_bytes(old / "float32.calibration")
    _spoil(old / "float32.calibration")
    made = calibrate(old / "float32.zarr", "loki:rank=2")
    assert {file.name for file in made}.isdisjoint(before)
    results = analyze(old / "float32.zarr", ["loki:rank=2"], [4], min_context=4)
    for layer, metric in ((0, "error_norm"), (1, "recall")):
        figure = FIGURES["loki:rank=2", layer, metric]
        assert figures(results)["loki:rank=2", layer, metric, 1, 4] == pytest.approx(figure, 1e-5)


def _spoil(folder: Path) -> None:
    """Other numbers in every kept file, whole otherwise."""
    for file in folder.rglob("*.npz"):
        with np.load(file) as archive:
            arrays = dict(archive)
        for name, array in arrays.items():
            if array.dtype.kind == "f":
                arrays[name] = array + 1
        np.savez(file, **arrays)
