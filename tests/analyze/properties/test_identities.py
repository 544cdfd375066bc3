"""What holds for any selection whose output is renormalised, without sinks (arXiv:2512.07647)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrace.analyze import analyze
from retrace.traces import Trace

HEADS = 12
ARBITRARY = """
@dataclass(frozen=True, kw_only=True)
class Arbitrary(ScoreMethod):
    def build(self, past):
        return torch.arange(past.end)

    def scores(self, state, queries, positions):
        return torch.cos(state[: int(positions[-1]) + 1] * 2.3).expand(*queries.shape[:2], -1)
"""
"""Selects keys for no reason."""


def arbitrary(query: Any, k: int) -> list[int]:
    """What `Arbitrary` selects."""
    scores = np.cos(np.arange(len(query.keys), dtype=np.float32) * np.float32(2.3))
    return query.best(scores, k)


def figures_by_head(results: Any, method: str, k: int) -> pd.DataFrame:
    """Figures (heads, metrics) of the one query of each head."""
    rows = results.metrics
    rows = rows[(rows.method == method) & (rows.topk == k)]
    assert set(rows["count"].unique()) <= {0, 1}
    return rows.pivot(index="head", columns="metric", values="mean")


@settings(max_examples=12)
@given(
    length=st.integers(2, 60),
    k=st.integers(1, 70),
    peak=st.sampled_from([2.0**-9, 0.25, 0.5, 1.0]),
    seed=st.integers(0, 999),
)
def test_renormalised_output(
    make_trace: Callable[..., Trace],
    rules: Any,
    queries_of: Any,
    write_methods: Callable[[str], str],
    length: int,
    k: int,
    peak: float,
    seed: int,
) -> None:
    layer = rules(heads=HEADS, kv_heads=HEADS, scale=peak)
    trace = make_trace(layer, [length], queries=[[length - 1]], seed=seed)
    spec = f"{write_methods(ARBITRARY)}:Arbitrary"
    results = analyze(trace, ["exact", spec], [k], min_context=0, keep_exact=False)
    found = figures_by_head(results, "mine.py:Arbitrary", k)
    exact = figures_by_head(results, "exact", k)
    for (query,) in queries_of(trace):
        figures, ids = found.loc[query.head], arbitrary(query, k)
        others = [j for j in query.visible if j not in ids]
        p, fraction = query.probabilities, figures["attention_fraction"]
        tau = p[others].sum()
        assert fraction == pytest.approx(p[ids].sum(), rel=1e-4)
        assert 1 - fraction == pytest.approx(tau, abs=1e-5)
        chosen = p[ids] / p[ids].sum()
        divergence = (chosen * np.log(chosen / p[ids])).sum()
        assert divergence == pytest.approx(-np.log(fraction), abs=1e-4)
        if others:
            mean = chosen @ query.values[ids]
            tail = p[others] @ query.values[others] / tau
            lost = tau * np.linalg.norm(tail - mean)
            assert np.allclose(query.output - mean, tau * (tail - mean), atol=1e-9)
        else:
            lost = 0.0
        error = figures["error_norm"] * np.linalg.norm(query.output)
        assert error == pytest.approx(lost, abs=5e-5)
        assert 0 <= figures["recall"] <= 1
        assert 0 < figures["density"] <= 1
        assert fraction <= exact.loc[query.head, "attention_fraction"] + 1e-6


@pytest.mark.parametrize("changes", [{}, {"window": 9}, {"heads": 4, "kv_heads": 1}], ids=str)
def test_no_method_holds_more_mass_than_exact(
    make_trace: Callable[..., Trace], rules: Any, changes: dict[str, Any]
) -> None:
    trace = make_trace(rules(**changes))
    methods = ["random", "loki:basis=own", "sparq", "exact:pool=sum", "exact:keep=sink:2"]
    rows = analyze(trace, methods, [2, 5], min_context=0, keep_exact=False).curves
    # Two sinks are more than a budget of one key.
    rows = rows[(rows.method != "exact:keep=sink:2") | (rows.topk >= 2)]
    table = rows.pivot(index=["method", "head", "topk"], columns="metric", values="mean")
    assert (table["attention_fraction"] <= table["exact_attention_fraction"] + 1e-6).all()


def test_sinks_leave_the_fraction_below_one(make_trace: Callable[..., Trace], rules: Any) -> None:
    trace = make_trace(rules(sinks=(3.0, 5.0)))
    rows = analyze(trace, topk=[60], min_context=0, keep_exact=False).metrics
    assert (rows[rows.metric == "attention_fraction"]["mean"] < 0.99).all()
    assert (rows[rows.metric == "error_norm"]["mean"] < 1e-5).all()
