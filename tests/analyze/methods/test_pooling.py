"""How the heads of a group agree on one selection."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.traces import Trace


def softmax(scores: Any) -> Any:
    """Probabilities (group, positions) of scores with -inf for hidden keys."""
    weights = np.exp(scores)
    return weights / weights.sum(axis=-1, keepdims=True)


POOLED: dict[str, Callable[[Any], Any]] = {
    "none": lambda q: q.scores,
    "sum": lambda q: sum(q.scores_of(other) for other in q.group),
    "mean": lambda q: np.mean([q.scores_of(other) for other in q.group], axis=0),
    "max": lambda q: np.max([q.scores_of(other) for other in q.group], axis=0),
    "sum-softmax": lambda q: softmax([q.scores_of(other) for other in q.group]).sum(axis=0),
    "max-softmax": lambda q: softmax([q.scores_of(other) for other in q.group]).max(axis=0),
    "mean-query": lambda q: q.scores_of(q.group.mean(axis=0)),
}


@pytest.mark.parametrize("pool", POOLED)
@pytest.mark.parametrize("changes", [{}, {"window": 20, "softcap": 8.0}], ids=str)
def test_figures(
    make_trace: Callable[..., Trace],
    rules: Any,
    expected: Any,
    assert_figures: Any,
    pool: str,
    changes: dict[str, Any],
) -> None:
    trace = make_trace(rules(heads=4, **changes))
    spec = "exact" if pool == "none" else f"exact:pool={pool}"
    results = analyze(trace, [spec], [2, 5], min_context=0, keep_exact=False)
    for k in (2, 5):
        figures = expected(
            trace,
            lambda q, k: q.best(POOLED[pool](q), k),
            k,
            first=0,
            aux=lambda q: len(q.visible) * q.rules.key_dim * 2,
            holds_keys=True,
        )
        assert_figures(results, spec, k, figures)


@pytest.mark.parametrize("pool", POOLED)
def test_pages_pool_too(
    make_trace: Callable[..., Trace],
    rules: Any,
    expected: Any,
    assert_figures: Any,
    pool: str,
) -> None:
    def bounds(q: Any, query: Any) -> Any:
        pages = [q.keys[: q.position + 1][p : p + 4] for p in range(0, q.position + 1, 4)]
        query = q.rules.scale * query
        return np.array(
            [np.maximum(query * k.min(axis=0), query * k.max(axis=0)).sum() for k in pages]
        )

    def select(q: Any, k: int) -> list[int]:
        every = np.array([bounds(q, other) for other in q.group])
        rules: dict[str, Callable[[], Any]] = {
            "none": lambda: bounds(q, q.query),
            "sum": lambda: every.sum(axis=0),
            "mean": lambda: every.mean(axis=0),
            "max": lambda: every.max(axis=0),
            "sum-softmax": lambda: softmax(every).sum(axis=0),
            "max-softmax": lambda: softmax(every).max(axis=0),
            "mean-query": lambda: bounds(q, q.group.mean(axis=0)),
        }
        score = rules[pool]()
        best = sorted(range(len(score)), key=lambda p: (-score[p], p))[: max(1, k // 4)]
        return [j for p in best for j in range(4 * p, min(4 * p + 4, q.position + 1))]

    trace = make_trace(rules(heads=4))
    spec = f"quest:pool={pool},page=4,least_pages=1"
    results = analyze(trace, [spec], [8], min_context=0, keep_exact=False)
    figures = expected(trace, select, 8, first=0).drop("bytes_ratio")
    assert_figures(results, results.methods()[0], 8, figures)
