"""Recall and attention fraction at every budget on the way to the largest."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import analyze
from retrace.traces import Trace

MakeTrace = Callable[..., Trace]
METHODS = [
    "exact",
    "quest:page=4",
    "window",
    "loki:basis=own",
    "sparq:keep=none",
    "exact:keep=sink:2",
]


def indexed(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows by everything that names them."""
    return frame.set_index(["method", "head", "topk", "metric"]).sort_index()


def test_each_budget_as_if_asked_for_alone(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(heads=4))
    together = analyze(trace, METHODS, [9], min_context=20, keep_exact=False)
    for k in (1, 2, 5, 8):
        alone = analyze(trace, METHODS, [k], min_context=20, keep_exact=False)
        curves = together.curves[together.curves.topk == k]
        metrics = alone.metrics[alone.metrics.metric.isin(curves.metric.unique())]
        a, b = indexed(curves)[["mean", "std", "count"]], indexed(metrics)[["mean", "std", "count"]]
        pd.testing.assert_frame_equal(a, b, atol=1e-6)


def test_exact_curve(make_trace: MakeTrace, rules: Any, expected: Any) -> None:
    trace = make_trace(rules(heads=4, kv_heads=1, window=40))
    curves = analyze(trace, topk=[20], min_context=5, keep_exact=False).curves
    curves = curves.set_index(["topk", "metric", "head"]).sort_index()
    for k in range(1, 21):
        figures = expected(trace, lambda q, k: q.top(k), k, first=5)
        for metric in ("recall", "attention_fraction", "exact_attention_fraction"):
            for moment in ("mean", "std"):
                np.testing.assert_allclose(
                    curves.loc[(k, metric), moment], figures.loc[metric, moment], atol=1e-5
                )


def test_last_point_is_the_metric(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules())
    results = analyze(trace, METHODS, [2, 4], keep_exact=False)
    for k in (2, 4):
        metrics = results.metrics[results.metrics.metric.isin(results.curves.metric.unique())]
        a, b = (
            indexed(f[f.topk == k])[["mean", "std", "count"]] for f in (results.curves, metrics)
        )
        pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("counted", [{}, {"min_context": 10}], ids=["usual", "position"])
@pytest.mark.parametrize("method", METHODS)
def test_fraction_never_falls(
    make_trace: MakeTrace, rules: Any, method: str, counted: dict[str, Any]
) -> None:
    trace = make_trace(rules(heads=4), [330, 120])
    results = analyze(trace, [method], [30], keep_exact=False, **counted)
    for metric in ("attention_fraction", "exact_attention_fraction"):
        curve = results.curves[results.curves.metric == metric].pivot(
            index="topk", columns="head", values="mean"
        )
        assert list(curve.index) == list(range(1, 31))
        assert (curve.diff().iloc[1:] >= -1e-9).all(axis=None)
        assert ((curve >= 0) & (curve <= 1 + 1e-6)).all(axis=None)
