"""Intervals that a page holds are those that the results themselves give."""

import base64
import gzip
from collections.abc import Callable

import numpy as np
import pytest

from retrace.analyze import Results
from retrace.analyze.metrics.registry import WITH_INTERVAL
from retrace.analyze.outputs.report.intervals import ends_within, intervals_of
from retrace.analyze.outputs.report.packed import Packed

Make = Callable[..., Results]
METHODS = ["exact", "quest", "loki"]


@pytest.mark.parametrize("alike", [True, False], ids=["same-queries", "a-head-lacks-some"])
def test_intervals_and_differences(made: Make, alike: bool) -> None:
    results = made([0, 2], 3, METHODS, [5, 10], [5], sequences=True)
    rows = results.sequences
    if not alike:
        rows.loc[(rows["layer"] == 2) & (rows["head"] == 1) & (rows["sequence"] == 0), "count"] = 3
    known, pairs = intervals_of(results)
    assert list(known) == METHODS
    for row in results.intervals("model", metrics=WITH_INTERVAL).itertuples():
        ends = known[str(row.method)][str(row.metric)][str(row.topk)]
        assert ends == pytest.approx([row.low, row.high], rel=1e-5)
    assert {(m, other) for m in pairs for other in pairs[m]} == {
        ("quest", "exact"),
        ("loki", "exact"),
        ("loki", "quest"),
    }
    for row in results.difference("loki", "quest", metrics=WITH_INTERVAL).itertuples():
        ends = pairs["loki"]["quest"][str(row.metric)][str(row.topk)]
        assert ends == pytest.approx([row.low, row.high], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("alike", [True, False], ids=["same-queries", "a-head-lacks-some"])
def test_intervals_of_layers_and_heads(made: Make, alike: bool) -> None:
    layers, heads = [0, 2], 3
    results = made(layers, heads, METHODS, [5, 10], [5], sequences=True)
    rows = results.sequences
    if not alike:
        rows.loc[(rows["layer"] == 2) & (rows["head"] == 1) & (rows["sequence"] == 0), "count"] = 3
    packed = Packed()
    places = ends_within(results, layers, heads, packed)
    planes = np.frombuffer(gzip.decompress(base64.b64decode(packed.text())), np.uint8)
    figures = np.ascontiguousarray(planes.reshape(4, -1).T).view("<f4").ravel()
    for over, shape in (("layer", (2, 2)), ("head", (2, 2, heads))):
        for row in results.intervals(over, metrics=WITH_INTERVAL).itertuples():
            place = places[over][str(row.method)][str(row.metric)][str(row.topk)]
            ends = figures[place : place + np.prod(shape)].reshape(shape)
            at = [layers.index(row.layer), *([row.head] if over == "head" else [])]
            assert ends[(slice(None), *at)] == pytest.approx([row.low, row.high], rel=1e-4)


def test_of_too_many_heads_there_are_those_of_layers(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = made([0, 2], 3, METHODS, [5, 10], [5], sequences=True)
    monkeypatch.setattr("retrace.analyze.outputs.report.intervals.HEADS", 3 * 2 * 3 * 6 - 1)
    places = ends_within(results, [0, 2], 3, Packed())
    assert set(places["layer"]) == set(METHODS) and not places["head"]


def test_methods_of_different_budgets_have_no_difference(made: Make) -> None:
    results = made([0], 2, ["exact", "quest"], [5, 10], [5], sequences=True)
    rows = results.sequences
    results.sequences = rows[(rows["method"] == "quest") == (rows["topk"] == 10)]
    known, pairs = intervals_of(results)
    assert list(known["quest"]["recall"]) == ["10"] and not pairs


def test_one_sequence_has_none(made: Make) -> None:
    results = made([0], 2, ["exact", "quest"], [5], [5], sequences=True)
    results.sequences = results.sequences[results.sequences["sequence"] == 1]
    assert intervals_of(results) == ({}, {})
    assert ends_within(results, [0, 2], 2, Packed()) == {"layer": {}, "head": {}}
