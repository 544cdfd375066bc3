"""Attention functions as models define them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.traces import Trace

MakeTrace = Callable[..., Trace]
TOP = """
def top(query, key, value, attention_mask, head_mask, topk=3):
    assert head_mask is None
    assert query.shape[1] == key.shape[1] == value.shape[1]
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + attention_mask
    best, ids = scores.sort(dim=-1, descending=True, stable=True)
    best, ids = best[..., :topk], ids[..., :topk]
    seen = best > torch.finfo(best.dtype).min / 2
    weights = torch.softmax(best, dim=-1)
    values = value[:, :, None].expand(-1, -1, query.shape[2], -1, -1)
    chosen = values.gather(3, ids[..., None].expand(*ids.shape, value.shape[-1]))
    return (weights[..., None] * chosen).sum(dim=-2), None, ids.masked_fill(~seen, -1)


def always_three(query, key, value, attention_mask, head_mask):
    return top(query, key, value, attention_mask, head_mask, topk=3)


def doubled(query, key, value, attention_mask, head_mask, topk):
    output, scores, ids = top(query, key, value, attention_mask, head_mask, topk=topk)
    return 2 * output, scores, ids
"""


@pytest.mark.parametrize("changes", [{"heads": 4}, {"window": 9}, {"value_dim": 3, "scale": 0.3}])
def test_with_a_budget(
    make_trace: MakeTrace,
    rules: Any,
    expected: Any,
    assert_figures: Any,
    write_methods: Any,
    changes: dict[str, Any],
) -> None:
    trace = make_trace(rules(**changes))
    spec = f"{write_methods(TOP)}:top"
    results = analyze(trace, [spec], [2, 5], min_context=0, keep_exact=False)
    for k in (2, 5):
        figures = expected(trace, lambda q, k: q.top(k), k, first=0)
        assert_figures(results, "mine.py:top", k, figures.loc[["density", "recall"]], atol=0.1)
        rows = results.metrics[results.metrics.topk == k].set_index(["metric", "head"])["mean"]
        # Rounding of the scaled queries may turn ties, and no more.
        np.testing.assert_allclose(
            rows["attention_fraction"], rows["exact_attention_fraction"], atol=1e-6
        )


def test_without_a_budget_one_answer_stands_for_all(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any, write_methods: Any
) -> None:
    trace = make_trace(rules())
    spec = f"{write_methods(TOP)}:always_three"
    results = analyze(trace, [spec], [1, 3, 5], min_context=0, keep_exact=False)
    rows = results.metrics[results.metrics.metric == "density"]
    assert rows.groupby("head")["mean"].nunique().tolist() == [1, 1]
    figures = expected(trace, lambda q, k: q.top(3), 5, first=0)
    assert_figures(results, "mine.py:always_three", 5, figures.loc[["recall", "density"]], atol=0.1)


def test_output_is_the_function_s_own(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any, write_methods: Any
) -> None:
    def twice(query: Any, ids: Sequence[int]) -> Any:
        return 2 * query.renormalised(ids)

    trace = make_trace(rules())
    spec = f"{write_methods(TOP)}:doubled"
    results = analyze(trace, [spec], [53], min_context=0, keep_exact=False)
    figures = expected(trace, lambda q, k: q.top(k), 53, first=0, output=twice)
    assert_figures(results, "mine.py:doubled", 53, figures)
    assert figures.loc["error_norm", "mean"].to_numpy() == pytest.approx(1)
