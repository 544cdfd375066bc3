"""RetrievalAttention's graph against plain Python in float64, and what it is good for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import Past, parse_spec
from retrace.analyze.methods.retrieval_attention import RetrievalAttention
from retrace.analyze.methods.toolkit import graphs
from retrace.analyze.units.unit import Unit, load_units
from retrace.traces import LayerRules, Trace

MakeTrace = Callable[..., Trace]
Rules = Callable[..., LayerRules]
Array = np.ndarray[Any, np.dtype[np.float64]]
LENGTH, END, SINK = 300, 240, 3
SPEC = f"retrieval-attention:sink={SINK},near=6,links=5,ef_construction=12,ef=16"


@pytest.fixture
def unit(make_trace: MakeTrace, rules: Rules) -> Unit:
    """Two heads whose queries lie far from all keys, in a direction of their own."""
    trace = make_trace(rules(heads=2, kv_heads=1), [LENGTH])
    [unit] = load_units(trace.layer(0), 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(t.shape, generator=generator) for t in (unit.keys, unit.queries))
    queries[..., 0] += 6
    # On a grid on which products are exact in float32, and ties rare.
    return replace(unit, keys=(keys * 256).round() / 256, queries=(queries * 256).round() / 256)


def built(unit: Unit, spec: str = SPEC, end: int = END) -> tuple[RetrievalAttention, Any]:
    method = parse_spec(spec).method
    assert isinstance(method, RetrievalAttention)
    return method, method.build(Past(unit, 0, end))


def choose(keys: Array, key: int, candidates: list[int], most: int) -> list[int]:
    """The nearest that no chosen one hides, then the nearest of the rest."""
    if len(candidates) <= most:
        return candidates
    ranked = sorted(candidates, key=lambda j: -keys[j] @ keys[key])
    chosen: list[int] = []
    for j in ranked:
        if all(keys[j] @ keys[i] <= keys[j] @ keys[key] for i in chosen):
            chosen.append(j)
    return [*chosen, *(j for j in ranked if j not in chosen)][:most]


def relink(keys: Array, graph: list[list[int]], key: int, others: list[int], most: int) -> None:
    new = [j for j in others if j != key and j not in graph[key]]
    if new:
        graph[key] = choose(keys, key, graph[key] + new, most)
    for j in graph[key]:
        if key not in graph[j]:
            graph[j] = choose(keys, j, [*graph[j], key], most)


def walk(keys: Array, links: list[list[int]], entry: int, query: Array, width: int) -> list[int]:
    """The best keys that a search meets, best first."""
    met, expanded, best = {entry}, set[int](), [entry]
    while left := [j for j in best if j not in expanded]:
        expanded.add(left[0])
        met.update(links[left[0]])
        best = sorted(met, key=lambda j: -keys[j] @ query)[:width]
    return best


def plain_graph(method: RetrievalAttention, past: Past, head: int, entry: int) -> list[list[int]]:
    """The links of each key but the sinks."""
    keys = past.keys[SINK:].double().numpy()
    queries = past.queries[head].double().numpy()
    shared: list[list[int]] = [[] for _ in keys]
    for position, query in enumerate(queries):
        seen = range(max(0, position + 1 - SINK))
        near = sorted(seen, key=lambda j: -keys[j] @ query)[: method.near]
        if near:
            relink(keys, shared, near[0], near[1:], method.links)
    own: list[list[int]] = [[] for _ in keys]
    for key in range(len(keys)):
        if key != entry:
            both = [a + b for a, b in zip(shared, own, strict=True)]
            found = walk(keys, both, entry, keys[key], method.ef_construction)
            relink(keys, own, key, found, method.links)
    return [a + b for a, b in zip(shared, own, strict=True)]


def recall(state: Any, method: RetrievalAttention, unit: Unit, k: int, end: int) -> float:
    """Of the k best of the first `end` keys, for the queries after END."""
    queries = unit.queries[:, END:] * unit.group.rules.scale
    found = method.search(state, queries, k)
    wanted = (queries @ unit.keys[:end].T).topk(k, dim=-1).indices
    return float((found[..., None] == wanted[..., None, :]).sum() / wanted.numel())


@pytest.mark.parametrize("head", [0, 1])
def test_graph_and_search(unit: Unit, head: int) -> None:
    method, state = built(unit)
    past, entry = Past(unit, 0, END), state["entry"]
    links = plain_graph(method, past, head, entry)
    found = [[int(j) for j in row if j >= 0] for row in state["links"][head]]
    assert [sorted(row) for row in found] == [sorted(row) for row in links]
    keys = unit.keys[:END].double().numpy()
    mean = keys[SINK:].mean(axis=0)
    assert entry == int(np.linalg.norm(keys[SINK:] - mean, axis=1).argmin())
    queries = unit.queries[:, END:] * unit.group.rules.scale
    ids = method.search(state, queries, 10)[head].tolist()
    for row, query in enumerate(queries[head].double().numpy()):
        met = [j + SINK for j in walk(keys[SINK:], links, entry, query, method.ef)]
        best = sorted([*range(SINK), *met], key=lambda j: -keys[j] @ query)
        assert ids[row] == best[:10]


def test_past_queries_help_where_queries_lie_elsewhere(
    unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, state = built(unit)
    with_queries = recall(state, method, unit, 10, END)
    monkeypatch.setattr(graphs, "project", lambda *_: None)
    without = recall(built(unit)[1], method, unit, 10, END)
    assert with_queries > without + 0.05


def test_all_links_find_all(unit: Unit) -> None:
    """A graph in which every key is linked with every other, and its cost."""
    method, state = built(unit, f"retrieval-attention:sink={SINK},links=300,ef_construction=300")
    assert recall(state, method, unit, 20, END) == 1
    queries = unit.queries[:, END:] * unit.group.rules.scale
    method.search(state, queries, END)
    read = method.aux_bytes(state, torch.full((LENGTH - END,), END), unit.group)
    followed = 2 * (END - SINK) * 2 * 300 * 4
    compared = SINK + 2 * (END - SINK)
    assert (torch.as_tensor(read) == compared * unit.group.key_bytes + followed).all()


@pytest.mark.parametrize("first", [2, 17, END])
def test_later_keys_are_found(unit: Unit, first: int) -> None:
    """Also where the first state holds no key besides sinks, or not all of those."""
    method, state = built(
        unit, f"retrieval-attention:sink={SINK},near=6,links=20,ef_construction=60", first
    )
    for start in range(first, END + 40, 20):
        state = method.extend(state, Past(unit, start, start + 20))
    held = len(state["sinks"]) + len(state["keys"])
    assert len(state["sinks"]) == SINK
    queries = unit.queries[:, held:] * unit.group.rules.scale
    found = method.search(state, queries, 10)
    wanted = (queries @ unit.keys[:held].T).topk(10, dim=-1).indices
    assert (found[..., None] == wanted[..., None, :]).sum() / wanted.numel() > 0.8
    assert not (found >= held).any()
