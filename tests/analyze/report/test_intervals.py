"""Intervals that a page holds are those that the results themselves give."""

from collections.abc import Callable

import pytest

from retrace.analyze import Results
from retrace.analyze.report.intervals import intervals_of
from retrace.analyze.results import WITH_INTERVAL

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
