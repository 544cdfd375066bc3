"""Figures at equal bytes: by a plain definition, within what was measured, and in pairs."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from retrace.analyze import Results, analyze
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
METHODS = ["sparq:rank=2", "window", "random"]
BUDGETS = [2, 5, 9, 14]
METRICS = ["error_norm", "attention_fraction", "recall", "bytes_ratio"]
LENGTHS = (53, 61, 1, 70, 44, 66)
SHARE = 0.35
"""That all three read at some budget."""


@pytest.fixture(scope="module")
def found() -> dict[str, Results]:
    return {}


@pytest.fixture
def results(make_trace: MakeTrace, rules: Any, found: dict[str, Results]) -> Results:
    """Of two layers of unlike heads, and sequences of unlike lengths."""
    if not found:
        trace = make_trace([rules(heads=4), rules(window=30)], LENGTHS)
        found["all"] = analyze(trace, METHODS, BUDGETS, min_context=20, keep_exact=False)
    return found["all"]


def mean(rows: list[dict[str, Any]], k: int, metric: str, weights: dict[int, float]) -> float:
    """The mean over heads and layers, where sequences count so many times."""
    heads = defaultdict(list)
    for row in rows:
        if row["topk"] == k and row["metric"] == metric:
            weight = row["count"] * weights.get(row["sequence"], 1.0)
            heads[row["layer"], row["head"]].append((float(row["mean"]), weight))
    each = [sum(m * n for m, n in head) / sum(n for _, n in head) for head in heads.values()]
    return sum(each) / len(each)


def read_off(
    rows: list[dict[str, Any]], share: float, metric: str, weights: dict[int, float]
) -> float:
    """The figure on the line between the two budgets around the share."""
    read = [mean(rows, k, "bytes_ratio", weights) for k in BUDGETS]
    for i in reversed(range(len(BUDGETS) - 1)):
        if read[i] <= share < read[i + 1]:
            a, b = (mean(rows, k, metric, weights) for k in BUDGETS[i : i + 2])
            return a + (b - a) * (share - read[i]) / (read[i + 1] - read[i])
    return np.nan


def rows_of(results: Results, method: str) -> list[dict[str, Any]]:
    rows = results.sequences
    return (
        rows[rows["method"] == method].astype({"method": "str", "metric": "str"}).to_dict("records")
    )


def reach(figure: Callable[[dict[int, float]], float], rows: list[dict[str, Any]]) -> float:
    """Half the interval's length: what each sequence adds is what the figure changes by where it
    counts a little more."""
    shares: dict[int, list[float]] = defaultdict(list)
    heads = defaultdict(dict)
    for row in rows:
        if row["topk"] == BUDGETS[0] and row["metric"] == "recall":
            heads[row["layer"], row["head"]][row["sequence"]] = row["count"]
    for counts in heads.values():
        for sequence, count in counts.items():
            shares[sequence].append(count / sum(counts.values()))
    weight = {sequence: sum(parts) / len(heads) for sequence, parts in shares.items()}
    step = 1e-4
    adds = {s: (figure({s: 1 + step}) - figure({s: 1 - step})) / (2 * step) for s in weight}
    squares = sum(w * w for w in weight.values())
    error = np.sqrt(sum(adds[s] ** 2 / weight[s] for s in weight) * squares / (1 - squares))
    alike = 1 / squares
    return float(stats.t.ppf(0.975, alike - 1) * (1 + min(0.9, 4 / alike)) * error)


@pytest.mark.parametrize("method", METHODS)
def test_against_the_definition(results: Results, method: str) -> None:
    rows = rows_of(results, method)
    table = results.at_bytes([SHARE], methods=[method], metrics=METRICS).set_index("metric")
    for metric in METRICS:
        figure = read_off(rows, SHARE, metric, {})
        wide = reach(lambda weights, m=metric: read_off(rows, SHARE, m, weights), rows)  # type: ignore[misc]
        least, most = 0.0, np.inf if metric in ("error_norm", "bytes_ratio") else 1.0
        expected = [figure, max(least, figure - wide), min(most, figure + wide)]
        ours = table.loc[metric, ["mean", "low", "high"]].to_numpy(float)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert table.loc["bytes_ratio", "mean"] == pytest.approx(SHARE, abs=1e-9)
    assert (table["sequences"] == 5).all()
    assert BUDGETS[0] < table["topk"].iloc[0] < BUDGETS[-1]


def test_differences_are_paired(results: Results) -> None:
    """The interval of a difference is that of sequences drawn together."""
    ours, theirs = (rows_of(results, method) for method in METHODS[:2])
    table = results.at_bytes([SHARE], against=METHODS[1], metrics=METRICS[:3])
    table = table.set_index(["method", "metric"])
    for metric in METRICS[:3]:

        def apart(weights: dict[int, float], metric: str = metric) -> float:
            return read_off(ours, SHARE, metric, weights) - read_off(theirs, SHARE, metric, weights)

        wide = reach(apart, ours)
        found = table.loc[(METHODS[0], metric), ["mean", "low", "high"]].to_numpy(float)
        expected = [apart({}), apart({}) - wide, apart({}) + wide]
        if metric != "error_norm":
            expected = [expected[0], max(-1.0, expected[1]), min(1.0, expected[2])]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    itself = table.loc[METHODS[1], ["mean", "low", "high"]].to_numpy(float)
    np.testing.assert_allclose(itself, 0.0, atol=1e-12)


def test_at_a_budget_it_is_the_budget(results: Results) -> None:
    whole = results.intervals("model", methods=["window"], metrics=METRICS)
    for k in BUDGETS:
        rows = whole[whole["topk"] == k].set_index("metric")
        share = float(rows.loc["bytes_ratio", "mean"])
        found = results.at_bytes([share], methods=["window"], metrics=METRICS).set_index("metric")
        assert (found["topk"] == k).all()
        names = ["mean", "low", "high", "sequences"]
        pd.testing.assert_frame_equal(
            found.loc[METRICS, names], rows.loc[METRICS, names], check_names=False
        )


def test_nothing_is_said_beyond_what_was_measured(results: Results) -> None:
    for method in METHODS:
        read = [mean(rows_of(results, method), k, "bytes_ratio", {}) for k in BUDGETS]
        beyond = [min(read) - 0.001, max(read) + 0.001]
        table = results.at_bytes(beyond, methods=[method], metrics=METRICS)
        assert len(table) == 2 * len(METRICS)
        assert table[["mean", "low", "high", "topk"]].isna().all().all()
        np.testing.assert_allclose(table["least"], min(read), rtol=1e-6)
        np.testing.assert_allclose(table["most"], max(read), rtol=1e-6)
    against = results.at_bytes([0.999], against="window", metrics=["recall"])
    assert against["mean"].isna().all()


def test_bytes_that_fall_as_the_budget_grows(results: Results) -> None:
    """Between the last budget within the share and the next."""
    rows = results.sequences
    of_bytes = (rows["method"] == "window") & (rows["metric"] == "bytes_ratio")
    shares = dict(zip(BUDGETS, (0.1, 0.5, 0.2, 0.6), strict=True))
    turned = rows["mean"].where(~of_bytes, rows["topk"].map(shares)).astype(rows["mean"].dtype)
    odd = Results(results.metrics, results.curves, results.run, rows.assign(mean=turned))
    found = odd.at_bytes([0.3], methods=["window"], metrics=["recall"])
    assert found["topk"].item() == pytest.approx(9 + (0.3 - 0.2) / (0.6 - 0.2) * 5)


def test_what_cannot_be_read_off(make_trace: MakeTrace, rules: Any, results: Results) -> None:
    with pytest.raises(RetraceError, match="exact has no figures per sequence here"):
        results.at_bytes([0.3], methods=["exact"])
    with pytest.raises(RetraceError, match="A share of the bytes is above 0"):
        results.at_bytes([-0.1])
    each = analyze(make_trace(rules(), (300, 280)), ["window"], [10, 20], min_context="each")
    share = float(each.metrics.query("metric == 'bytes_ratio'")["mean"].mean())
    with pytest.raises(RetraceError, match="other queries at top-k 10 than at 20"):
        each.at_bytes([share])
    blocks = analyze(make_trace(rules(), (64,)), ["subblock:block=16"], [16], protocol="prefill:16")
    with pytest.raises(RetraceError, match="compared by the pairs"):
        blocks.at_bytes([0.3])
