"""One selection for all heads of a layer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.traces import Trace


def heads_of(queries: Any, position: int, sequence_length: int) -> list[Any]:
    """Every head's query at a position of the sequence of this length, in order."""
    found = [
        query
        for group in queries
        for query in group
        if query.position == position and len(query.keys) == sequence_length
    ]
    return sorted(found, key=lambda query: int(query.head))


def softmax(scores: Any) -> Any:
    weights = np.exp(scores)
    return weights / weights.sum(axis=-1, keepdims=True)


POOLED: dict[str, Callable[[Any], Any]] = {
    "layer-sum": lambda scores: scores.sum(axis=0),
    "layer-mean": lambda scores: scores.mean(axis=0),
    "layer-max": lambda scores: scores.max(axis=0),
    "layer-sum-softmax": lambda scores: softmax(scores).sum(axis=0),
    "layer-max-softmax": lambda scores: softmax(scores).max(axis=0),
}


@pytest.mark.parametrize("pool", POOLED)
@pytest.mark.parametrize("changes", [{}, {"window": 20, "softcap": 8.0}], ids=str)
def test_figures(
    make_trace: Callable[..., Trace],
    rules: Any,
    expected: Any,
    assert_figures: Any,
    queries_of: Any,
    pool: str,
    changes: dict[str, Any],
) -> None:
    trace = make_trace(rules(heads=4, **changes))
    queries = queries_of(trace)

    def select(query: Any, k: int) -> list[int]:
        heads = heads_of(queries, query.position, len(query.keys))
        assert len(heads) == 4
        return query.best(POOLED[pool](np.array([head.scores for head in heads])), k)

    spec = f"exact:pool={pool}"
    results = analyze(trace, [spec], [3], min_context=0, keep_exact=False)
    assert_figures(results, spec, 3, expected(trace, select, 3, first=0).drop("bytes_ratio"))


def test_fitted_methods_too(make_trace: Callable[..., Trace], rules: Any) -> None:
    """The heads' states advance together; all components make them exact."""
    trace = make_trace(rules(heads=4), (60, 40))
    specs = ["exact:pool=layer-mean", "loki:pool=layer-mean,rank=8,basis=own"]
    rows = analyze(trace, specs, [4], protocol="all:16", min_context=0, keep_exact=False).metrics
    exact, loki = (
        rows[(rows.method == spec) & (rows.metric == "attention_fraction")]["mean"].to_numpy()
        for spec in specs
    )
    assert loki == pytest.approx(exact, abs=0.02)
