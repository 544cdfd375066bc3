"""Recall takes a method's k best keys in its own order, attended recall all that it attended."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from retrace.analyze import analyze
from retrace.analyze.methods.retroinfer import RetroInfer
from retrace.analyze.methods.toolkit.partial_attention import attended_ids
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Block, load_units
from retrace.traces import Trace

MakeTrace = Callable[..., Trace]


def test_pages_in_the_order_of_their_bounds(
    make_trace: MakeTrace, rules: Any, queries_of: Any
) -> None:
    trace, page, k = make_trace(rules(), [60], name="own"), 4, 6
    figures: dict[tuple[str, int], list[float]] = {}
    for [query] in queries_of(trace):
        if query.position < 20:
            continue
        bounds = []
        for start in range(0, query.position + 1, page):
            keys = query.keys[start : start + page]
            keys = keys[: query.position + 1 - start]
            products = np.maximum(query.query * keys.max(axis=0), query.query * keys.min(axis=0))
            bounds.append((-products.sum(), start, len(keys)))
        listed: list[int] = []
        for _, start, count in sorted(bounds)[:3]:  # no fewer are read
            listed += range(start, start + count)
        best = set(query.top(k))
        for metric, ids in (("recall", listed[:k]), ("attended_recall", listed)):
            found = len(best & set(ids)) / min(k, query.position + 1)
            figures.setdefault((metric, query.head), []).append(found)
    rows = analyze(trace, [f"quest:page={page}"], [k], min_context=20, keep_exact=False).metrics
    means = rows.set_index(["metric", "head"])["mean"]
    for at, shares in figures.items():
        np.testing.assert_allclose(means[at], np.mean(shares), atol=1e-9)


def test_kept_keys_and_then_units_by_merit() -> None:
    attended = torch.tensor([[[1, 0, 1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 1, 0, 0]]]).bool()
    merit = torch.tensor([0.0, 0.0, 1.0, 1.0, 5.0, 5.0, 0.0, 0.0])
    kept = torch.tensor([1, 1, 0, 0, 0, 0, 1, 1]).bool()
    listed = attended_ids(attended, merit, kept, sink=2).tolist()
    assert [[[i for i in row if i >= 0] for row in head] for head in listed] == [
        [[0, 7, 6, 4, 2, 3], [0, 1, 5]]
    ]
    listed = attended_ids(attended, merit).tolist()
    assert [[i for i in row if i >= 0] for row in listed[0]] == [[4, 2, 3, 0, 6, 7], [5, 0, 1]]


def test_clusters_are_listed_as_they_rank(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(heads=2, kv_heads=1), [120], name="own")
    [unit] = load_units(trace.layer(0), 0, torch.device("cpu"))
    method = RetroInfer(size=4, sink=2, recent=5)
    block = Block(unit, slice(100, 120))
    [served] = States(method, unit, Protocol(prefix=100)).serve(block)
    state, queries = served.state, block.queries * unit.group.rules.scale
    ids = method.attend(state, queries, block.positions, 12)[1]
    together = (queries.double() @ state.centroids.double().T).softmax(dim=-1).sum(dim=0)
    for head in range(2):
        for row, position in enumerate(block.positions.tolist()):
            listed = [key for key in ids[head, row].tolist() if key >= 0]
            newest = list(range(position, 94, -1))
            assert listed[: 2 + len(newest)] == [0, 1, *newest]
            clustered = listed[2 + len(newest) :]
            labels = [int(state.labels[key - 2]) for key in clustered]
            ranked = together[row].argsort(descending=True).tolist()
            assert clustered
            assert labels == sorted(labels, key=ranked.index)
            for (key, label), (later, its) in pairwise(zip(clustered, labels, strict=True)):
                assert label != its or key < later
