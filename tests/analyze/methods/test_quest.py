"""Quest: pages of keys ranked by the bound on their scores."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import Past, analyze
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.units.unit import load_units
from retrace.traces import LayerRules, Trace

MakeTrace = Callable[..., Trace]


def bounds(query: Any, page: int) -> dict[int, float]:
    """The bound of every page that holds a visible key, from its keys up to the query."""
    found = {}
    for p in sorted({int(j) // page for j in query.visible}):
        keys = query.keys[p * page : min((p + 1) * page, query.position + 1)]
        low, high = keys.min(axis=0), keys.max(axis=0)
        found[p] = float(np.maximum(query.query * low, query.query * high).sum())
    return found


def best_pages(page: int, least: int = 3) -> Callable[[Any, int], list[int]]:
    """The visible keys of the max(least, k // page) pages of largest bound."""

    def select(query: Any, k: int) -> list[int]:
        bound = bounds(query, page)
        pages = sorted(bound, key=lambda p: (-bound[p], p))[: max(least, k // page)]
        return [j for p in pages for j in query.visible if j // page == p]

    return select


@pytest.mark.parametrize(
    ("page", "least", "k"), [(4, 3, 5), (4, 3, 17), (4, 1, 5), (16, 3, 2), (5, 2, 13), (100, 3, 3)]
)
def test_figures(
    make_trace: MakeTrace,
    rules: Any,
    expected: Any,
    assert_figures: Any,
    page: int,
    least: int,
    k: int,
) -> None:
    trace = make_trace(rules(heads=4), (83, 30))
    spec = f"quest:page={page},least_pages={least}"
    results = analyze(trace, [spec], [k], min_context=0, keep_exact=False)
    figures = expected(
        trace,
        best_pages(page, least),
        k,
        first=0,
        aux=lambda q: 2 * -(-len(q.visible) // page) * q.rules.key_dim * 2,
    )
    assert_figures(results, results.methods()[0], k, figures)


def test_every_kind_of_layer(
    make_trace: MakeTrace, expected: Any, assert_figures: Any, any_rules: LayerRules
) -> None:
    trace = make_trace(any_rules)
    results = analyze(trace, ["quest:page=4"], [3], min_context=0, keep_exact=False)
    figures = expected(trace, best_pages(4), 3, first=0).drop("bytes_ratio")
    assert_figures(results, "quest:page=4", 3, figures)


def test_bound_is_at_least_every_score(make_trace: MakeTrace, rules: Any, queries_of: Any) -> None:
    trace = make_trace(rules(heads=4), [61])
    method = parse_spec("quest:page=7").method
    units = list(load_units(trace.layer(0), 0, torch.device("cpu")))
    for group in queries_of(trace):
        unit = units[group[0].head // 2]
        position = torch.tensor([group[0].position])
        state = method.build(Past(unit, 0, len(unit.keys)))
        scores = method.scores(state, unit.queries[:, position], position)  # type: ignore[attr-defined]
        for query, row in zip(group, scores[:, 0].tolist(), strict=True):
            for p, bound in bounds(query, 7).items():
                assert row[p] == pytest.approx(bound, abs=1e-4)
                inside = [j for j in query.visible if j // 7 == p]
                assert bound >= (query.keys[inside] @ query.query).max() - 1e-9


def test_pages_of_one_key_are_exact(make_trace: MakeTrace, any_rules: LayerRules) -> None:
    trace = make_trace(any_rules)
    spec = "quest:page=1,least_pages=1"
    rows = analyze(trace, ["exact", spec], [1, 4], min_context=0, keep_exact=False).metrics
    exact, quest = (
        rows[(rows.method == name) & (rows.metric != "bytes_ratio")].drop(columns="method")
        for name in ("exact", spec)
    )
    keys = ["topk", "metric", "head"]
    exact, quest = (r.sort_values(keys).reset_index(drop=True) for r in (exact, quest))
    # A cap may make scores equal whose products are not, so that ties fall another way.
    np.testing.assert_allclose(quest["mean"], exact["mean"], atol=1e-5)


def test_partial_page_follows_the_query(make_trace: MakeTrace, rules: Any) -> None:
    # The future half of the last page would win by far if its keys counted.
    layer = rules(heads=1, kv_heads=1)
    key = np.ones((1, 12, 8))
    key[:, 7:] = 100
    key[:, 4:7] = -1
    trace = make_trace(
        layer, [12], queries=[[6]], tensors={(0, 0): (np.ones((1, 12, 8)), key, key)}
    )
    spec = "quest:page=4,least_pages=1"
    rows = analyze(trace, [spec], [4], min_context=0, keep_exact=False).metrics
    assert rows[rows.metric == "recall"]["mean"].tolist() == [1.0]
