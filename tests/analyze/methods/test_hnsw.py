"""The graph index of faiss."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.traces import Trace

pytest.importorskip(
    "faiss", reason="faiss is not installed: pip install 'retrace-attention[faiss]'"
)

MakeTrace = Callable[..., Trace]


@pytest.mark.parametrize("protocol", ["all", "prefix:20", "prefix:0.9"])
@pytest.mark.parametrize("changes", [{"heads": 4}, {"softcap": 8.0}, {"value_dim": 3}], ids=str)
def test_a_wide_beam_finds_all(
    make_trace: MakeTrace,
    rules: Any,
    expected: Any,
    assert_figures: Any,
    protocol: str,
    changes: dict[str, Any],
) -> None:
    trace = make_trace(rules(**changes), (90, 40))
    first = {"all": 0, "prefix:20": 20}.get(protocol)
    spec = "hnsw:ef=500,step=7"
    results = analyze(trace, [spec], [4], protocol=protocol, min_context=0, keep_exact=False)
    rows = results.metrics.set_index(["metric", "head"])["mean"]
    np.testing.assert_allclose(rows["recall"], 1, atol=0.02)  # ties may be found in another order
    np.testing.assert_allclose(
        rows["attention_fraction"], rows["exact_attention_fraction"], atol=1e-3
    )
    if first is not None:
        count = expected(trace, lambda q, k: q.top(k), 4, first=first)["count"].unique()
        assert results.metrics.set_index("metric").loc["recall", "count"].unique() == count


def test_a_window_hides_keys_that_the_graph_holds(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(window=20), [90])
    rows = analyze(trace, ["hnsw:ef=500,step=7"], [4], keep_exact=False).metrics
    recall = rows[rows.metric == "recall"]["mean"]
    assert (recall > 0.1).all() and (recall <= 1).all()


def test_cost_is_of_the_keys_compared(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(heads=1, kv_heads=1), [400], queries=[range(390, 400)])
    rows = analyze(trace, ["hnsw:ef=4,m=4", "hnsw:ef=300,m=4"], [4], keep_exact=False).metrics
    bytes_ratio = rows[rows.metric == "bytes_ratio"].set_index("method")["mean"]
    assert 0 < bytes_ratio["hnsw:m=4,ef=4"] < bytes_ratio["hnsw:m=4,ef=300"]
