"""Loki: scores in the leading principal components of earlier keys."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.traces import Trace

MakeTrace = Callable[..., Trace]


def by_components(rank: int, fitted_to: Callable[[int], int]) -> Callable[[Any, int], list[int]]:
    """The k best keys by the first `rank` components of the first `fitted_to(position)` keys;
    the exact best where those are none."""

    def select(query: Any, k: int) -> list[int]:
        count = fitted_to(query.position)
        if count == 0:
            return query.top(k)
        covariance = np.cov(query.keys[:count].T, bias=True)
        basis = np.linalg.eigh(covariance)[1][:, ::-1][:, :rank]
        return query.best((query.keys @ basis) @ (query.query @ basis), k)

    return select


@pytest.mark.parametrize(
    ("spec", "rank"),
    [("loki:basis=own", 2), ("loki:rank=1,basis=own", 1), ("loki:rank=5,basis=own", 5)],
)
def test_basis_of_a_prefix(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any, spec: str, rank: int
) -> None:
    trace = make_trace(rules(heads=4), (90, 40))
    results = analyze(trace, [spec], [4], protocol="prefix:30", min_context=0, keep_exact=False)
    figures = expected(
        trace,
        by_components(rank, lambda position: 30),
        4,
        first=30,
        aux=lambda q: (len(q.visible) + q.rules.key_dim) * rank * 2,
    )
    assert_figures(results, spec, 4, figures)


def test_prefix_as_a_fraction(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any
) -> None:
    trace = make_trace(rules(), [90])
    results = analyze(trace, ["loki:basis=own"], [2], protocol="prefix:0.5", keep_exact=False)
    figures = expected(trace, by_components(2, lambda position: 45), 2, first=45)
    assert_figures(results, "loki:basis=own", 2, figures.drop("bytes_ratio"))
    assert results.metrics["protocol"].unique() == ["prefix:0.5"]


def test_basis_is_rebuilt_as_the_sequence_grows(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any
) -> None:
    def built_at(position: int) -> int:
        """At 16 keys, and from 20 on at every twentieth position."""
        return position // 20 * 20 if position >= 20 else 16 if position >= 16 else 0

    trace = make_trace(rules(heads=4), (90, 40))
    results = analyze(
        trace, ["loki:basis=own"], [3], protocol="all:20", min_context=0, keep_exact=False
    )
    figures = expected(trace, by_components(2, built_at), 3, first=0)
    assert_figures(results, "loki:basis=own", 3, figures.drop("bytes_ratio"))


def test_all_components_are_exact(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(heads=4, window=40))
    rows = analyze(trace, ["loki:rank=8,basis=own"], [4], min_context=0, keep_exact=False).metrics
    # Rounding may turn the order of equal scores.
    recall = rows[rows.metric == "recall"]["mean"]
    assert (recall > 0.9).all()
    fraction = rows.set_index(["metric", "head"])["mean"]
    np.testing.assert_allclose(
        fraction["attention_fraction"], fraction["exact_attention_fraction"], atol=1e-6
    )


def test_keys_read_before_there_is_a_basis(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any
) -> None:
    trace = make_trace(rules(), [60], queries=[range(16)])
    results = analyze(trace, ["loki:basis=own"], [3], min_context=0, keep_exact=False)
    figures = expected(
        trace,
        lambda q, k: q.top(k),
        3,
        first=0,
        aux=lambda q: len(q.visible) * q.rules.key_dim * 2,
        holds_keys=True,
    )
    assert_figures(results, "loki:basis=own", 3, figures)
