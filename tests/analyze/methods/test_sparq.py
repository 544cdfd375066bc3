"""SparQ Attention against algorithm 1 of its paper (arXiv:2312.04985), query by query."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.traces import LayerRules, Trace

MakeTrace = Callable[..., Trace]


def estimates(query: Any, rank: int) -> Any:
    """Estimated scores (group, positions) of all heads of the query's group, -inf if hidden.

    The `rank` channels where the group's queries are largest in sum of magnitudes; a softmax
    temperature of sqrt(d * |q[C]|_1 / |q|_1), with the layer's scale for 1 / sqrt(d).
    """
    magnitude = np.abs(query.group)
    channels = np.argsort(-magnitude.sum(axis=0), kind="stable")[:rank]
    share = magnitude[:, channels].sum(axis=1) / magnitude.sum(axis=1)
    dots = query.group[:, channels] @ query.keys[:, channels].T
    scores = np.full(dots.shape, -np.inf)
    seen = query.visible
    scores[:, seen] = query.rules.scale * dots[:, seen] / np.sqrt(share)[:, None]
    return scores


def newest_and_best(rank: int) -> Callable[[Any, int], list[int]]:
    """The k // 4 newest keys, then those of largest estimate, summed over the group."""

    def select(query: Any, k: int) -> list[int]:
        newest = [int(j) for j in query.visible[::-1][: k // 4]]
        ranked = query.best(estimates(query, rank).sum(axis=0), len(query.keys))
        return newest + [j for j in ranked if j not in newest][: k - len(newest)]

    return select


def filled(rank: int) -> Callable[[Any, Sequence[int]], Any]:
    """alpha o_S + (1 - alpha) mean(V), alpha the estimated mass of S."""

    def output(query: Any, ids: Sequence[int]) -> Any:
        mine = np.exp(estimates(query, rank)[query.head % query.rules.group])
        alpha = mine[list(ids)].sum() / mine.sum()
        mean = query.values[query.visible].mean(axis=0)
        return alpha * query.renormalised(ids) + (1 - alpha) * mean

    return output


@pytest.fixture
def untied(rules: Any, tensors: Any) -> Any:
    """Rules and tensors whose queries have no two channels of equal magnitude."""

    def make(length: int, **changes: Any) -> Any:
        layer, rng = rules(**changes), np.random.default_rng(5)
        query, key, value = tensors(layer, length, rng)
        query = query + rng.uniform(0.01, 0.1, query.shape)
        return layer, (query, key, value)

    return make


@pytest.mark.parametrize("changes", [{}, {"heads": 4}, {"heads": 3, "kv_heads": 1}], ids=str)
@pytest.mark.parametrize("k", [2, 4, 13])
def test_figures(
    make_trace: MakeTrace, untied: Any, expected: Any, assert_figures: Any, changes: Any, k: int
) -> None:
    layer, given = untied(70, **changes)
    trace = make_trace(layer, [70], tensors={(0, 0): given})
    results = analyze(trace, ["sparq:rank=3"], [k], min_context=0, keep_exact=False)
    figures = expected(
        trace,
        newest_and_best(3),
        k,
        first=0,
        aux=lambda q: (len(q.visible) * 3 + q.rules.value_dim) * 2,
        output=filled(3),
    )
    assert_figures(results, "sparq:rank=3", k, figures)


def test_without_fill(
    make_trace: MakeTrace, untied: Any, expected: Any, assert_figures: Any
) -> None:
    layer, given = untied(70, heads=4)
    trace = make_trace(layer, [70], tensors={(0, 0): given})
    spec = "sparq:rank=3,output=renorm"
    results = analyze(trace, [spec], [6], min_context=0, keep_exact=False)
    figures = expected(trace, newest_and_best(3), 6, first=0, aux=lambda q: len(q.visible) * 3 * 2)
    assert_figures(results, results.methods()[0], 6, figures)


def test_mean_is_over_visible_values(
    make_trace: MakeTrace, untied: Any, expected: Any, assert_figures: Any
) -> None:
    layer, given = untied(70, window=20)
    trace = make_trace(layer, [70], tensors={(0, 0): given})
    results = analyze(trace, ["sparq:rank=3"], [4], min_context=0, keep_exact=False)
    figures = expected(trace, newest_and_best(3), 4, first=0, output=filled(3))
    assert_figures(results, "sparq:rank=3", 4, figures.drop("bytes_ratio"))


def test_all_channels_are_the_pooled_oracle(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any
) -> None:
    def pooled(query: Any, k: int) -> list[int]:
        return query.best(sum(query.scores_of(q) for q in query.group), k)

    def with_exact_mass(query: Any, ids: Sequence[int]) -> Any:
        alpha = query.probabilities[list(ids)].sum()
        mean = query.values[query.visible].mean(axis=0)
        return alpha * query.renormalised(ids) + (1 - alpha) * mean

    trace = make_trace(rules(heads=4))
    spec = "sparq:keep=none"  # its 32 channels are more than all
    results = analyze(trace, [spec], [5], min_context=0, keep_exact=False)
    figures = expected(trace, pooled, 5, first=0, output=with_exact_mass).drop("bytes_ratio")
    assert_figures(results, spec, 5, figures)


def test_zero_query(make_trace: MakeTrace, rules: Any, tensors: Any) -> None:
    layer = rules()
    query, key, value = tensors(layer, 40, np.random.default_rng(0))
    trace = make_trace(layer, [40], tensors={(0, 0): (query * 0, key, value)})
    rows = analyze(trace, ["sparq:rank=3"], [4], min_context=0, keep_exact=False).metrics
    assert not rows[rows.metric == "error_norm"]["mean"].isna().any()


def test_every_kind_of_layer(
    make_trace: MakeTrace, any_rules: LayerRules, expected: Any, assert_figures: Any
) -> None:
    trace = make_trace(any_rules)
    spec = "sparq:rank=3,output=renorm"
    results = analyze(trace, [spec], [1], min_context=0, keep_exact=False)
    assert set(results.metrics["head"]) == set(range(any_rules.heads))
    rows = results.metrics[results.metrics.metric == "density"]
    assert (rows["mean"] > 0).all() and (rows["mean"] <= 1).all()
