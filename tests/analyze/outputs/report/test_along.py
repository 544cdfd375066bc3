"""Figures by position that a page holds are those of the results."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import Results
from retrace.analyze.metrics.buckets import AXES
from retrace.analyze.metrics.registry import BUCKETED
from retrace.analyze.outputs.report.page import page

pytest.importorskip("plotly", reason="needs the report extra")

Make = Callable[..., Results]
LAYERS, HEADS, FIRSTS = [0, 2, 7], 3, [1, 64, 128]


@pytest.fixture
def results(made: Make) -> Results:
    """Of which the last budget lacks the first bucket."""
    results = made(LAYERS, HEADS, ["exact", "quest"], [5, 10], [5], positions=FIRSTS)
    rows = results.positions
    results.positions = rows[(rows["topk"] == 5) | (rows["first"] > 1)]
    return results


@pytest.mark.parametrize("whole", [True, False], ids=["heads", "means-over-heads"])
def test_every_bucket(
    results: Results, held: Any, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(
            "retrace.analyze.outputs.report.along.FIGURES", len(results.positions) - 1
        )
    read = held(page({"r": results}))
    [run] = read.index["runs"]
    assert run["along"]["heads"] == (HEADS if whole else 1)
    shape = (len(FIRSTS), len(LAYERS), run["along"]["heads"])
    for axis in AXES:
        assert run["along"]["axes"][axis]["firsts"] == FIRSTS
        assert run["along"]["axes"][axis]["queries"] == {"5": [2, 65, 129], "10": [0, 65, 129]}
    for method in ("exact", "quest"):
        entry = read.entry(method)
        for axis, metric, k in ((a, m, k) for a in AXES for m in BUCKETED for k in (5, 10)):
            place = entry["along"][axis][metric][str(k)]
            found = read.figures[place : place + np.prod(shape)].reshape(shape)
            rows = results.positions
            for name, value in dict(method=method, axis=axis, metric=metric, topk=k).items():
                rows = rows[rows[name] == value]
            wanted = rows.pivot_table("mean", ["first", "layer"], "head").to_numpy(float)
            wanted = wanted.reshape(-1, len(LAYERS), HEADS)
            if not whole:
                wanted = wanted.mean(axis=2, keepdims=True)
            if k == 10:
                assert np.isnan(found[0]).all()
                found = found[1:]
            np.testing.assert_allclose(found, wanted, rtol=3e-4)


def test_a_layer_and_head_that_no_table_has_are_left_out(results: Results, held: Any) -> None:
    rows = results.positions
    results.positions = pd.concat([rows.assign(layer=9), rows.assign(head=99)])
    read = held(page({"r": results}))
    assert read.index["runs"][0]["along"]["axes"] == {}


def test_exact_attention_read_off_others_has_none(made: Make, held: Any) -> None:
    results = made([0], 2, ["quest"], [5], [5], positions=FIRSTS)
    read = held(page({"r": results}))
    assert [bool(entry["along"]) for entry in read.index["entries"]] == [False, True]


def test_one_bucket_of_one_head(made: Make, held: Any) -> None:
    # Three rows, as many as columns tell figures apart by.
    results = made([0], 1, ["exact"], [5], [5], positions=[64])
    [entry] = held(page({"r": results})).index["entries"]
    assert {axis: set(places) for axis, places in entry["along"].items()} == {
        axis: set(BUCKETED) for axis in AXES
    }
