"""Exact attention over the top k against the definitions, for every kind of layer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.traces import LayerRules, Trace

MakeTrace = Callable[..., Trace]


def keys_of(query: Any) -> float:
    """Bytes of all visible keys in float32, which exact attention reads to rank them."""
    return len(query.visible) * query.rules.key_dim * 2


def test_figures(
    make_trace: MakeTrace, expected: Any, assert_figures: Any, any_rules: LayerRules
) -> None:
    trace = make_trace(any_rules)
    results = analyze(trace, topk=[1, 2, 3, 5], keep_exact=False)
    for k in (1, 2, 3, 5):
        figures = expected(trace, lambda q, k: q.top(k), k, first=50, aux=keys_of, holds_keys=True)
        assert_figures(results, "exact", k, figures)


def test_recall_is_one(make_trace: MakeTrace, any_rules: LayerRules) -> None:
    rows = analyze(make_trace(any_rules), topk=[1, 4], keep_exact=False).metrics
    recall = rows[rows.metric == "recall"]
    assert (recall["mean"] == 1).all() and (recall["std"] == 0).all()


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_figures_in_every_dtype(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any, dtype: str
) -> None:
    trace = make_trace(rules(heads=4), dtype=dtype)
    size = 2
    results = analyze(trace, topk=[3], keep_exact=False)
    figures = expected(
        trace,
        lambda q, k: q.top(k),
        3,
        aux=lambda q: len(q.visible) * q.rules.key_dim * size,
        holds_keys=True,
    )
    assert_figures(results, "exact", 3, figures)


def test_every_layer_stands_for_itself(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any
) -> None:
    layers = [rules(), rules(window=7), rules(heads=4, kv_heads=1, value_dim=3)]
    trace = make_trace(layers)
    results = analyze(trace, topk=[2], keep_exact=False)
    for layer in range(3):
        figures = expected(trace, lambda q, k: q.top(k), 2, layer=layer)
        assert_figures(results, "exact", 2, figures.drop("bytes_ratio"), layer=layer)
    assert list(results.metrics["module"].unique()) == [f"model.layers.{i}" for i in range(3)]


def test_sampled_queries(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any
) -> None:
    queries = [[3, 19, 20, 21, 51, 52], [0], [23]]
    trace = make_trace(rules(heads=4, window=30), queries=queries)
    results = analyze(trace, topk=[2], keep_exact=False)
    figures = expected(trace, lambda q, k: q.top(k), 2)
    assert figures["count"].unique() == [4 + 1]
    assert_figures(results, "exact", 2, figures.drop("bytes_ratio"))


def test_outlier_sequence_does_not_cancel(
    make_trace: MakeTrace, rules: Any, tensors: Any, expected: Any, assert_figures: Any
) -> None:
    layer = rules()
    query, key, value = tensors(layer, 53, np.random.default_rng(3))
    trace = make_trace(layer, tensors={(0, 0): (query * 4, key, value * 1000)})
    results = analyze(trace, topk=[2], keep_exact=False)
    figures = expected(trace, lambda q, k: q.top(k), 2)
    assert_figures(results, "exact", 2, figures.drop("bytes_ratio"))
