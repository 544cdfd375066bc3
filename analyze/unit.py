"""The unit of work: one kv head of one layer and sequence; and a block of its queries."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from retrace.analyze.attention import first_visible, score, softcap, visible
from retrace.analyze.methods.base import HeadGroup
from retrace.traces import Layer, to_torch

BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Scores held at once: what stays in a CPU's cache, or fills a GPU."""
GATHER_COST = 8
"""How many times dearer a gathered key is than one of a whole matrix of scores."""


@dataclass(frozen=True)
class Unit:
    """One kv head's keys and values with the queries of its group, in float32."""

    group: HeadGroup
    queries: Tensor
    """(group, queries, channels)"""
    positions: Tensor
    """Position of each query (queries,) int64, ascending."""
    keys: Tensor
    """(positions, channels)"""
    values: Tensor
    """(positions, value channels)"""
    sinks: Tensor | None
    """Learned logit per query head (group,), where the layer has them."""
    dtype: torch.dtype = torch.float32
    """What the trace holds them in, if that is narrower: they are exact in it."""

    @cached_property
    def mean_values(self) -> Tensor:
        """Mean of the values that a query at each position sees (positions, value channels)."""
        last = torch.arange(len(self.values), device=self.values.device)
        first = first_visible(last, self.group.rules)
        sums = torch.nn.functional.pad(self.values.double().cumsum(dim=0), (0, 0, 1, 0))
        mean = (sums[last + 1] - sums[first]) / (last - first + 1)[:, None]
        return mean.to(self.values.dtype)

    def blocks(self, first_position: int, elements: int | None = None) -> Iterator["Block"]:
        """The queries from `first_position` on, in blocks of about `elements` scores each."""
        if elements is None:
            elements = BLOCK_ELEMENTS[self.keys.device.type]
        start = int(torch.searchsorted(self.positions, first_position))
        rows = max(1, elements // (len(self.queries) * len(self.keys)))
        for row in range(start, len(self.positions), rows):
            yield Block(self, slice(row, min(row + rows, len(self.positions))))


def load_units(layer: Layer, sequence: int, device: torch.device) -> Iterator[Unit]:
    """The units of one layer and sequence, kv head by kv head."""
    rules = layer.rules
    queries = to_torch(layer.query(sequence)).to(device)
    keys = to_torch(layer.key(sequence)).to(device)
    values = to_torch(layer.value(sequence)).to(device)
    positions = torch.from_numpy(layer.query_positions(sequence).astype("int64")).to(device)
    itemsize = queries.dtype.itemsize
    for kv_head in range(rules.kv_heads):
        heads = slice(kv_head * rules.group, (kv_head + 1) * rules.group)
        sinks = None if rules.sinks is None else torch.tensor(rules.sinks[heads], device=device)
        yield Unit(
            HeadGroup(layer.index, sequence, kv_head, rules, itemsize),
            queries[heads].float(),
            positions,
            keys[kv_head].float(),
            values[kv_head].float(),
            sinks,
            queries.dtype if itemsize < torch.float32.itemsize else torch.float32,
        )


class Block:
    """Some consecutive queries of a unit, against all keys that any of them sees.

    What several methods need is computed once, when it is first asked for.
    """

    def __init__(self, unit: Unit, rows: slice) -> None:
        self.unit = unit
        self.rows = rows
        self.queries = unit.queries[:, rows]
        self.positions = unit.positions[rows]
        self.end = int(self.positions[-1]) + 1
        """One past the last key that is visible to any of the queries."""

    @cached_property
    def visible(self) -> Tensor:
        """Which keys each query sees: bool (queries, keys)."""
        keys = torch.arange(self.end, device=self.positions.device)
        return visible(self.positions, keys, self.unit.group.rules)

    @cached_property
    def visible_count(self) -> Tensor:
        """How many keys each query sees (queries,)."""
        return self.visible.sum(dim=-1)

    @cached_property
    def scores(self) -> Tensor:
        """Exact scores (group, queries, keys), -inf where a key is not visible."""
        rules = self.unit.group.rules
        scores = score(self.queries, self.unit.keys[: self.end], rules)
        # Between the last query's first key and the first query's own, all see all.
        seen_from = int(first_visible(self.positions[-1:], rules))
        seen_to = max(int(self.positions[0]) + 1, seen_from)
        for strip in (slice(0, seen_from), slice(seen_to, self.end)):
            if strip.start < strip.stop:
                keys = torch.arange(strip.start, strip.stop, device=self.positions.device)
                hidden = ~visible(self.positions, keys, rules)
                scores[..., strip].masked_fill_(hidden, -torch.inf)
        return scores

    def scores_at(self, ids: Tensor) -> Tensor:
        """Exact scores (group, queries, any) of key ids of that shape; -inf for the id -1."""
        if "scores" not in self.__dict__ and ids.shape[-1] * GATHER_COST < self.end:
            chosen = self.unit.keys[ids.clamp(min=0)]
            dots = torch.matmul(chosen, self.queries[..., None]).squeeze(-1)
            rules = self.unit.group.rules
            scores = softcap(dots * rules.scale, rules)
        else:
            scores = self.scores.gather(-1, ids.clamp(min=0))
        return scores.masked_fill(ids < 0, -torch.inf)

    def part(self, rows: slice) -> "Block":
        """Some of this block's queries, with what is already computed for them."""
        start, stop, _ = rows.indices(len(self.positions))
        part = Block(self.unit, slice(self.rows.start + start, self.rows.start + stop))
        for name in ("visible", "scores"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][..., rows, : part.end]
        return part
