"""Figures per sequence, and their intervals: by definition, and how often they hold the truth."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from retrace.analyze import Results, analyze
from retrace.analyze.metrics.registry import MEDIAN
from retrace.analyze.tables.columns import SEQUENCE_COLUMNS
from retrace.analyze.tables.intervals import interval_of_mean
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
METHODS = ["quest:page=4", "window"]
MOST = {"error_norm": np.inf, "attention_fraction": 1.0, "recall": 1.0}
LENGTHS = (53, 61, 1, 70, 44, 66)


@pytest.fixture(scope="module")
def found() -> dict[str, Results]:
    return {}


@pytest.fixture
def results(make_trace: MakeTrace, rules: Any, found: dict[str, Results]) -> Results:
    """Of two layers of unlike heads, and sequences of unlike lengths."""
    if not found:
        trace = make_trace([rules(heads=4), rules(window=9)], LENGTHS)
        found["all"] = analyze(trace, METHODS, [2, 5], min_context=20, keep_exact=False)
    return found["all"]


def rows_of(values: np.ndarray[Any, Any], count: int = 1, metric: str = "recall") -> Results:
    """Results of one method and head with these figures (sequences,)."""
    rows = pd.DataFrame(
        {
            "method": "mine",
            "layer": 0,
            "module": "layer",
            "sequence": np.arange(len(values)),
            "head": 0,
            "topk": 1,
            "metric": metric,
            "mean": values,
            "count": count,
        }
    ).astype(SEQUENCE_COLUMNS)
    return Results(pd.DataFrame(), pd.DataFrame(), {}, rows)


def test_sequences_come_to_the_tables(results: Results) -> None:
    keys = ["method", "layer", "module", "head", "topk", "metric"]
    rows = results.sequences.assign(total=lambda r: r["mean"].astype(float) * r["count"])
    sums = rows.groupby(keys)[["total", "count"]].sum()
    whole = results.metrics.set_index(keys)
    assert (whole.loc[sums.index, "count"] == sums["count"]).all()
    np.testing.assert_allclose(
        sums["total"] / sums["count"], whole.loc[sums.index, "mean"], rtol=1e-5, atol=1e-6
    )
    assert set(results.sequences["sequence"]) == {0, 1, 3, 4, 5}  # of one, no query counts


def test_a_sequence_has_the_figures_it_has_alone(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), (53, 61))
    both = analyze(trace, METHODS, [3], keep_exact=False)
    alone = analyze(trace, METHODS, [3], keep_exact=False, calibration_sequences=[1])
    ours = both.sequences[both.sequences["sequence"] == 0]
    keys = ["method", "head", "metric"]
    pd.testing.assert_series_equal(
        ours.set_index(keys)["mean"].sort_index(),
        alone.metrics[alone.metrics["metric"] != MEDIAN].set_index(keys)["mean"].sort_index(),
        check_dtype=False,
        check_index_type=False,
        rtol=1e-6,
    )


def by_definition(rows: pd.DataFrame) -> tuple[float, float, float]:
    """Mean over layers and heads, its standard error, and of how many sequences of equal weight."""
    heads: dict[Any, dict[int, tuple[float, int]]] = defaultdict(dict)
    for row in rows.to_dict("records"):
        heads[row["layer"], row["head"]][row["sequence"]] = (float(row["mean"]), row["count"])
    figure, weight, apart = 0.0, defaultdict(float), defaultdict(float)
    for head in heads.values():
        total = sum(n for _, n in head.values())
        mean = sum(m * n for m, n in head.values()) / total
        figure += mean / len(heads)
        for sequence, (m, n) in head.items():
            weight[sequence] += n / total / len(heads)
            apart[sequence] += n / total * (m - mean) / len(heads)
    squares = sum(w * w for w in weight.values())
    variance = sum(weight[s] * (apart[s] / weight[s]) ** 2 for s in weight) / (1 - squares)
    return figure, float(np.sqrt(variance * squares)), 1 / squares


@pytest.mark.parametrize("metric", ["error_norm", "attention_fraction"])
def test_against_the_definition(results: Results, metric: str) -> None:
    rows = results.sequences
    rows = rows[(rows.method == "quest:page=4") & (rows.topk == 2) & (rows.metric == metric)]
    figure, error, alike = by_definition(rows)
    [ours] = results.intervals(
        "model", methods=["quest:page=4"], topk=[2], metrics=[metric]
    ).to_dict("records")
    wide = stats.t.ppf(0.975, alike - 1) * (1 + min(0.9, 4 / alike)) * error
    assert ours["sequences"] == rows["sequence"].nunique() > alike > 2
    found = [ours["mean"], ours["low"], ours["high"]]
    ends = np.clip([figure - wide, figure + wide], 0, MOST[metric])
    np.testing.assert_allclose(found, [figure, *ends], rtol=1e-6)


def test_heads_that_count_unlike_queries(results: Results) -> None:
    """Heads whose counts differ are averaged head by head, not query by query."""
    rows = results.sequences.copy()
    rows.loc[rows["head"] == 1, "count"] = 1
    uneven = Results(results.metrics, results.curves, results.run, rows)
    chosen = {"methods": ["window"], "topk": [2], "metrics": ["recall"]}
    [ours] = uneven.intervals("model", **chosen).to_dict("records")
    rows = rows[(rows.method == "window") & (rows.topk == 2) & (rows.metric == "recall")]
    assert ours["mean"] == pytest.approx(by_definition(rows)[0], rel=1e-6)


def test_groups_over_unlike_sequences(results: Results) -> None:
    """A method that lacks a sequence has an interval of those it has; order is that of the rows."""
    rows = results.sequences
    lacking = rows[~((rows["method"] == "quest:page=4") & (rows["sequence"] == 3))]
    some = Results(results.metrics, results.curves, results.run, lacking)
    found = some.intervals("layer", topk=[2])
    apart = [some.intervals("layer", methods=[m], topk=[2]) for m in METHODS]
    pd.testing.assert_frame_equal(found, pd.concat(apart, ignore_index=True))
    assert list(found.groupby("method", sort=False)["sequences"].first()) == [4, 5]
    shared = some.difference("quest:page=4", "window", metrics=["error_norm"])
    assert list(shared.set_index("topk").loc[[2], "sequences"]) == [4]


def test_levels_agree_with_the_tables(results: Results) -> None:
    layers = results.intervals("layer", metrics=["recall"]).set_index(["method", "topk", "module"])
    for row in results.table().to_dict("records"):
        ours = layers.loc[row["Method"], row["Top-k"], row["Layer"]]
        assert ours["mean"] == pytest.approx(row["Mean Recall"], rel=1e-5)
    heads = results.intervals("head")
    assert len(heads) == (results.metrics["metric"] != MEDIAN).sum()
    model = results.intervals("model", metrics=["recall"]).set_index(["method", "topk"])
    for at, mean in (
        heads[heads.metric == "recall"].groupby(["method", "topk"])["mean"].mean().items()
    ):
        assert model.loc[at, "mean"] == pytest.approx(mean, rel=1e-6)


Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray[Any, Any]]
SPREADS: dict[str, tuple[float, Draw]] = {
    "normal": (3.0, lambda g, size: g.normal(3.0, 1.0, size)),
    "uniform": (0.5, lambda g, size: g.random(size)),
    "lognormal": (np.exp(0.125), lambda g, size: g.lognormal(0.0, 0.5, size)),
    "exponential": (1.0, lambda g, size: g.exponential(1.0, size)),
    "turned": (9.0, lambda g, size: 10 - g.exponential(1.0, size)),
}
"""Means of sequences: the true one, and draws of (trials, sequences)."""


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("sequences", [2, 3, 4, 5, 8, 12, 20])
def test_how_often_intervals_hold_the_truth(sequences: int, spread: str) -> None:
    """95 of 100 times, of so few sequences and of means so skewed; heads are the trials here."""
    truth, draw = SPREADS[spread]
    samples = draw(np.random.default_rng(0), (2000, sequences)).astype(np.float32)
    one = rows_of(samples[0], metric="error_norm").sequences
    trials = pd.concat([one] * len(samples), ignore_index=True)
    trials = trials.assign(head=np.repeat(np.arange(len(samples)), sequences), mean=samples.ravel())
    rows = Results(pd.DataFrame(), pd.DataFrame(), {}, trials).intervals("head")
    held = (rows["low"] <= truth) & (rows["high"] >= truth)
    assert len(held) == 2000
    assert held.mean() > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 2000)


@pytest.mark.parametrize("lengths", [(9, 1), (7, 3), (1, 2, 5), (10, 1, 1, 1, 1, 1), range(1, 10)])
@pytest.mark.parametrize("spread", ["normal", "exponential"])
def test_sequences_of_unlike_weight(lengths: Sequence[int], spread: str) -> None:
    truth, draw = SPREADS[spread]
    counts = np.array(lengths, np.float64)
    samples = draw(np.random.default_rng(0), (2000, len(counts)))
    low, high = np.transpose([interval_of_mean(sample * counts, counts) for sample in samples])
    if np.isnan(low).all():  # one outweighs all others
        assert lengths == (9, 1)
        return
    assert ((low <= truth) & (high >= truth)).mean() > 0.935


def test_long_sequences_weigh_more() -> None:
    results = rows_of(np.array([0.0, 1.0, 1.0]))
    results.sequences["count"] = np.array([2, 3, 3], np.int32)
    [row] = results.intervals("model").to_dict("records")
    assert row["mean"] == 0.75
    assert (row["low"], row["high"]) == (0.0, 1.0)  # three tell little


def test_intervals_end_where_the_figure_does() -> None:
    values = np.array([0.2, 1.0, 1.0, 0.9])  # four tell little
    ends = interval_of_mean(values, np.ones(4))
    assert ends[0] < 0.0 and ends[1] > 1.0
    for metric, most in (("recall", 1.0), ("density", 1.0), ("error_norm", np.inf)):
        [row] = (
            rows_of(values, metric=metric).intervals("model", metrics=[metric]).to_dict("records")
        )
        assert (row["low"], row["high"]) == pytest.approx((0.0, min(ends[1], most)))
    # What rounding puts beyond is no reason to leave the figure out.
    [row] = rows_of(np.full(3, 1 + 1e-6)).intervals("model").to_dict("records")
    assert row["low"] <= row["mean"] <= row["high"]


def test_differences_end_where_those_of_figures_do() -> None:
    rows = {
        metric: pd.concat(
            [
                rows_of(values, metric=metric).sequences.assign(method=name)
                for name, values in (("a", np.zeros(3)), ("b", np.array([0.1, 1.0, 1.0])))
            ]
        )
        for metric in ("recall", "error_norm")
    }
    for metric, most in (("recall", 1.0), ("error_norm", np.inf)):
        results = Results(pd.DataFrame(), pd.DataFrame(), {}, rows[metric])
        [more] = results.difference("b", "a", metrics=[metric]).to_dict("records")
        [less] = results.difference("a", "b", metrics=[metric]).to_dict("records")
        assert more["high"] == -less["low"] and more["low"] == -less["high"] < 0.0
        assert more["high"] == most if metric == "recall" else 1.0 < more["high"] < most


def test_the_interval_of_one_mean_is_that_of_the_tables(results: Results) -> None:
    rows = results.sequences
    rows = rows[(rows.method == "window") & (rows.topk == 2) & (rows.metric == "recall")]
    rows = rows[(rows["layer"] == 0) & (rows["head"] == 1)]
    one = Results(pd.DataFrame(), pd.DataFrame(), {}, rows)
    [row] = one.intervals("model").to_dict("records")
    counts = rows["count"].to_numpy(np.float64)
    ends = interval_of_mean(rows["mean"].to_numpy(np.float64) * counts, counts)
    assert np.clip(ends, 0, 1) == pytest.approx((row["low"], row["high"]), rel=1e-6)
    assert np.isnan(interval_of_mean(np.array([3.0]), np.array([4.0]))).all()


def test_one_sequence_has_no_interval(make_trace: MakeTrace, rules: Any) -> None:
    results = analyze(make_trace(rules(), (53,)), ["window"], [2], keep_exact=False)
    row = results.intervals("model", metrics=["recall"]).iloc[0]
    assert np.isfinite(row["mean"]) and np.isnan(row["low"]) and np.isnan(row["high"])
    assert "more than one sequence" in results.markdown()
    assert "[" not in results.summary().to_string()


def test_differences_are_paired(results: Results) -> None:
    """What makes a sequence hard for both cancels, so that the interval is narrower."""
    found = results.difference("quest:page=4", "window", metrics=["error_norm"]).set_index("topk")
    means = results.intervals("model", metrics=["error_norm"]).set_index(["method", "topk"])
    for k in (2, 5):
        apart = means.loc[("quest:page=4", k), "mean"] - means.loc[("window", k), "mean"]
        assert found.loc[k, "mean"] == pytest.approx(apart, rel=1e-9)
        assert found.loc[k, "low"] <= found.loc[k, "mean"] <= found.loc[k, "high"]
    noise = np.random.default_rng(0).normal(size=12)
    rows = rows_of(noise).sequences
    other = rows.assign(method="other", mean=rows["mean"] + np.float32(0.5))
    both = Results(pd.DataFrame(), pd.DataFrame(), {}, pd.concat([rows, other]))
    [row] = both.difference("other", "mine").to_dict("records")
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((0.5, 0.5, 0.5), abs=1e-6)


def test_bars_in_the_plots(results: Results) -> None:
    from matplotlib.collections import LineCollection

    from retrace.analyze.metrics.registry import BY_NAME
    from retrace.analyze.outputs.plots.results import by_layer

    panel = by_layer(results, BY_NAME["error_norm"]).axes[0]  # of the smaller budget
    drawn = [c for c in panel.collections if isinstance(c, LineCollection)]
    known = results.intervals("layer", topk=[2], metrics=["error_norm"])
    for method, bars in zip(METHODS, drawn, strict=True):
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        rows = known[known["method"] == method]
        np.testing.assert_allclose(ends, rows[["low", "high"]])


def test_the_same_again(results: Results) -> None:
    pd.testing.assert_frame_equal(results.intervals("head"), results.intervals("head"))


def test_what_is_not_there(results: Results) -> None:
    with pytest.raises(RetraceError, match=r"'heads'.*model, layer, head"):
        results.intervals("heads")
    with pytest.raises(RetraceError, match=r"sparq.*quest:page=4, window"):
        results.difference("sparq", "window")


def test_kept_grown_and_left_out(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    trace = make_trace(rules(), (53, 61), name="own")
    grown = tmp_path / "r"
    analyze(trace, ["window"], [2], out=grown, keep_exact=False)
    both = analyze(trace, ["window", "random"], [2, 3], out=grown, keep_exact=False)
    read = Results.load(grown)
    pd.testing.assert_frame_equal(read.sequences, both.sequences)
    assert not read.sequences.duplicated(list(SEQUENCE_COLUMNS)[:-2]).any()
    recall = read.sequences[read.sequences["metric"] == "recall"]
    counts = recall.groupby(["method", "topk"]).size()
    assert len(counts) == 4 and counts.nunique() == 1
    assert set(read.without({"random"}).sequences["method"]) == {"window"}


def test_a_folder_that_kept_none(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    trace = make_trace(rules(), (53, 61), name="own")
    analyze(trace, ["window"], [2], out=tmp_path / "r", keep_exact=False)
    facts = tmp_path / "r" / "run.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "tables": {}}))  # as earlier ones
    (tmp_path / "r" / "sequences.parquet").unlink()
    read = Results.load(tmp_path / "r")
    assert read.sequences.empty and read.intervals("layer").empty
    assert "[" not in read.markdown()
    more = analyze(trace, ["random"], [2], out=tmp_path / "r", keep_exact=False)
    assert set(more.sequences["method"]) == {"random"}
    assert "window, 2" in more.markdown()
