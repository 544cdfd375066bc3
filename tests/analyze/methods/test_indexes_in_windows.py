"""An index in a layer with a window or chunks holds what its queries see, and nothing else."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import analyze, parse_spec
from retrace.analyze.methods.base import SearchMethod
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import States
from retrace.analyze.units.past import Past
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Block, Unit, load_units
from retrace.traces import Rotation, Trace

MakeTrace = Callable[..., Trace]
MakeUnit = Callable[..., Unit]
LENGTH = 260
LAYERS: list[dict[str, Any]] = [
    {"window": 100},
    {"window": 37},
    {"window": 3},
    {"chunk": 64},
    {"window": 50, "chunk": 128},
]
PROTOCOLS = ["all", "all:32", "prefix:70", "prefix:0.9"]


def needs(spec: str) -> None:
    extra = parse_spec(spec).method.extra
    assert extra is not None
    pytest.importorskip(extra, reason=f"{extra} is not installed")


@pytest.fixture
def unit(make_trace: MakeTrace, rules: Any) -> MakeUnit:
    """A group of two heads whose keys do not tie, in a layer of some rules."""

    def make(**changes: Any) -> Unit:
        trace = make_trace(rules(heads=2, kv_heads=1, key_dim=8, **changes), [LENGTH])
        [unit] = load_units(trace.layer(0), 0, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randn(t.shape, generator=generator) for t in (unit.keys, unit.queries))
        return replace(unit, **dict(zip(("keys", "queries"), drawn, strict=True)))

    return make


def answers(method: SearchMethod, unit: Unit, protocol: str, k: int) -> Any:
    """Of each query from 20 on, or of those the protocol answers: its position, the ids that the
    method attends (group, k) and the bytes that it reads to find them."""
    rule = Protocol.parse(protocol)
    start = max(20, rule.first_query(LENGTH))
    states = States(method, unit, rule)
    block = Block(unit, slice(start, LENGTH))
    for served in states.serve(block):
        part = served.block
        [found] = select(method, served, part, [k])
        read = torch.as_tensor(found.aux_bytes).expand(len(part.positions))
        for row, position in enumerate(part.positions.tolist()):
            yield position, found.ids[:, row], float(read[row])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_flat_finds_what_exact_does_for_the_same_bytes(
    make_trace: MakeTrace, rules: Any, layer: dict[str, Any], protocol: str
) -> None:
    needs("flat")
    trace = make_trace(rules(heads=2, kv_heads=1, **layer), [LENGTH])
    rows = analyze(
        trace, ["flat", "exact"], [4], protocol=protocol, min_context=20, keep_exact=False
    ).metrics
    means = rows.pivot_table("mean", "metric", "method")
    for metric in ("attention_fraction", "density"):
        np.testing.assert_allclose(means.loc[metric, "flat"], means.loc[metric, "exact"], atol=1e-4)
    # Heads may take other ones of tied keys, so that the union is another.
    np.testing.assert_allclose(*means.loc["bytes_ratio"], atol=0.01)


@pytest.mark.parametrize(
    "spec",
    [
        "flat",
        "ivf:nprobe=1000",
        "ivf-pq:nprobe=1000,rerank=300",
        "usearch:ef=300",
        "hnswlib:ef=300",
        "hnsw:ef=300",
        "retrieval-attention:ef=300,sink=4,step=8",
    ],
)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_search_of_everything_is_exact(unit: MakeUnit, layer: dict[str, Any], spec: str) -> None:
    method = parse_spec(spec).method
    if method.extra is not None:
        needs(spec)
    assert isinstance(method, SearchMethod)
    there, hits, wanted = unit(**layer), 0, 0
    scores = Block(there, slice(0, LENGTH)).scores
    for position, ids, _ in answers(method, there, "all", 5):
        visible = position + 1 - there.group.rules.first_visible(position)
        best = scores[:, position].topk(min(5, visible), dim=-1).indices
        for ours, theirs in zip(ids.tolist(), best.tolist(), strict=True):
            hits += len(set(ours) & set(theirs))
            wanted += len(theirs)
    assert hits >= 0.999 * wanted


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_an_index_of_ones_own(unit: MakeUnit, layer: dict[str, Any], protocol: str) -> None:
    """It numbers keys as they come, and needs to know of no window."""

    class Own(SearchMethod):
        def build(self, past: Past) -> Any:
            assert past.start == 0
            return past.keys

        def extend(self, state: Any, new: Past) -> Any:
            assert new.start == len(state)
            return torch.cat([state, new.keys])

        def search(self, state: Any, queries: torch.Tensor, k: int) -> torch.Tensor:
            sizes.append(len(state))
            return (queries @ state.T).topk(min(k, len(state)), dim=-1).indices

        def aux_bytes(self, state: Any, keys: Any, group: Any) -> float:
            return float(len(state) * group.key_bytes)

    there, sizes = unit(**layer), list[int]()
    scores = Block(there, slice(0, LENGTH)).scores
    for position, ids, read in answers(Own(step=8), there, protocol, 3):
        visible = position + 1 - there.group.rules.first_visible(position)
        best = scores[:, position].topk(min(3, visible), dim=-1).indices
        ours = [sorted(i for i in head if i >= 0) for head in ids.tolist()]
        assert ours == best.sort().values.tolist()
        assert read == visible * there.group.key_bytes
    assert sizes or layer == {"window": 3}
    assert max(sizes, default=0) <= min(layer.values())


def test_a_past_that_begins_later_knows_its_positions(unit: MakeUnit) -> None:
    """Keys and queries before position encoding are those of their place in the sequence."""
    rotation = Rotation((1.0, 0.1, 0.01, 0.001))
    whole = unit(window=40)
    whole = replace(
        whole, group=replace(whole.group, rules=replace(whole.group.rules, rotation=rotation))
    )
    every, later = Past(whole, 0, LENGTH), Past(whole.since(100), 0, LENGTH - 100)
    for name in ("keys_before_rotation", "queries_before_rotation"):
        ours, theirs = getattr(later, name), getattr(every, name)[..., 100:, :]
        torch.testing.assert_close(ours, theirs)
    turned = later.rotated(later.keys_before_rotation, torch.arange(LENGTH - 100))
    torch.testing.assert_close(turned, later.keys)
