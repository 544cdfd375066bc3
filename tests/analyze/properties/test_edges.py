"""Ties, budgets beyond what is visible, sequences of one position, queries that do not count."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.analyze.exact.reference import exact_pass
from retrace.analyze.units.unit import Block, load_units
from retrace.traces import LayerRules, RetraceError, Trace

MakeTrace = Callable[..., Trace]


def exact_ids(trace: Trace, ranks: int) -> list[Any]:
    """Exact ranking (group, queries, ranks) of the first kv head of the first sequence."""
    import torch

    unit = next(load_units(trace.layer(0), 0, torch.device("cpu")))
    return exact_pass(Block(unit, slice(0, len(unit.positions))), ranks).ids.tolist()


def test_identical_keys_rank_by_position(make_trace: MakeTrace, rules: Any) -> None:
    layer = rules(heads=1, kv_heads=1)
    ones = np.ones((1, 40, 8))
    trace = make_trace(layer, [40], tensors={(0, 0): (ones, ones, ones)})
    for position, ids in enumerate(exact_ids(trace, 6)[0]):
        visible = min(6, position + 1)
        assert ids == list(range(visible)) + [-1] * (6 - visible)


def test_identical_keys_rank_by_position_inside_a_window(make_trace: MakeTrace, rules: Any) -> None:
    layer = rules(heads=1, kv_heads=1, window=5)
    ones = np.ones((1, 40, 8))
    trace = make_trace(layer, [40], tensors={(0, 0): (ones, ones, ones)})
    for position, ids in enumerate(exact_ids(trace, 3)[0]):
        first = max(0, position - 4)
        wanted = list(range(first, min(first + 3, position + 1)))
        assert ids == wanted + [-1] * (3 - len(wanted))


def test_exact_ranking(make_trace: MakeTrace, any_rules: LayerRules, queries_of: Any) -> None:
    trace = make_trace(any_rules, [64])
    ids = exact_ids(trace, 9)
    for group in list(queries_of(trace))[:64]:
        for query in group:
            wanted = query.top(9)
            assert ids[query.head][query.position] == wanted + [-1] * (9 - len(wanted))


@pytest.mark.parametrize("k", [7, 60])
def test_budget_beyond_the_context(
    make_trace: MakeTrace, any_rules: LayerRules, expected: Any, assert_figures: Any, k: int
) -> None:
    trace = make_trace(any_rules)
    results = analyze(trace, topk=[k], min_context=0, keep_exact=False)
    figures = expected(trace, lambda q, k: q.top(k), k, first=0)
    assert_figures(results, "exact", k, figures.drop("bytes_ratio"))


@pytest.mark.parametrize(
    "method", ["exact", "random", "window", "quest", "sparq", "loki:basis=own"]
)
def test_everything_attended_is_exact(make_trace: MakeTrace, rules: Any, method: str) -> None:
    rows = analyze(
        make_trace(rules(heads=4, kv_heads=2, window=20)),
        [method],
        [60],
        min_context=0,
        keep_exact=False,
    ).metrics
    for metric, value in (("recall", 1), ("density", 1), ("attention_fraction", 1)):
        np.testing.assert_allclose(rows[rows.metric == metric]["mean"], value, atol=1e-5)
    np.testing.assert_allclose(rows[rows.metric == "error_norm"]["mean"], 0, atol=1e-5)


def test_sequences_of_one_position(make_trace: MakeTrace, rules: Any) -> None:
    rows = analyze(
        make_trace(rules(), [1, 1]), ["exact", "quest", "loki:basis=own"], [3], min_context=0
    ).metrics
    rows = rows.set_index("metric")
    assert (rows["count"].drop("candidate_recall", errors="ignore") == 2).all()
    for metric in ("recall", "attention_fraction", "exact_attention_fraction", "density"):
        np.testing.assert_allclose(rows.loc[metric, "mean"], 1, atol=1e-6)
    np.testing.assert_allclose(rows.loc["error_norm", "mean"], 0, atol=1e-6)


def test_min_context_overrides(make_trace: MakeTrace, rules: Any) -> None:
    rows = analyze(make_trace(rules()), topk=[1, 5], min_context=30, keep_exact=False).metrics
    assert rows["count"].unique() == [53 - 30]
    assert rows["min_context"].unique() == ["30"]


def test_padding_never_counts(
    make_trace: MakeTrace, rules: Any, tensors: Any, expected: Any, assert_figures: Any
) -> None:
    layer = rules()
    given = tensors(layer, 30, np.random.default_rng(1))
    alone = make_trace(layer, [30], tensors={(0, 0): given}, name="alone")
    queries = [range(30), range(20)]  # none of the long sequence's counts for k = 2
    padded = make_trace(layer, [30, 500], queries=queries, tensors={(0, 0): given}, name="padded")
    figures = expected(alone, lambda q, k: q.top(k), 2).drop("bytes_ratio")
    assert_figures(analyze(padded, topk=[2], keep_exact=False), "exact", 2, figures)


def test_no_query_counts(make_trace: MakeTrace, rules: Any) -> None:
    with pytest.raises(RetraceError, match=r"top-k 6.*at least 60.*ends at 52"):
        analyze(make_trace(rules()), topk=[6])


@pytest.mark.parametrize(
    "asked",
    [
        {"topk": []},
        {"topk": [0]},
        {"methods": []},
        {"layers": [7]},
        {"protocol": "some"},
        {"min_context": -1},
        {"device": "abacus"},
    ],
    ids=str,
)
def test_mistakes_are_refused(make_trace: MakeTrace, rules: Any, asked: dict[str, Any]) -> None:
    with pytest.raises(RetraceError):
        analyze(make_trace(rules()), **{"topk": [1], **asked})
