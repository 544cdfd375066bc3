"""The unit of work: one kv head of one layer and sequence; and a block of its queries."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64, Shaped
from torch import Tensor

from retrace.analyze.units.attention import first_visible, score, scores_at, visible
from retrace.analyze.units.costs import SERVING_ITEMSIZE
from retrace.analyze.units.seals import Seal, WrittenInto
from retrace.traces import Layer, LayerRules, RetraceError, Trace, to_torch

CPU_SCORES = 1 << 19
"""Scores held at once: what stays in a CPU's cache."""
GPU_BYTES_PER_SCORE = 128
"""Memory of a GPU for each score held at once there. A method takes about 10 bytes for one, and few
take 30; the fewer there are at once, the longer the GPU waits for Python: at 131,072 positions and
2^26 scores for nine tenths of the time."""
LEAST_ROWS = 16
"""Queries of a block at the least, however long the context: each reads all keys and values."""
READ_BYTES = 1 << 26
"""Tensors read at once: a long sequence's kv head by kv head, a short one's in few requests."""


def scores_at_once(device: torch.device) -> int:
    """How many scores a device holds at once."""
    if device.type == "cpu":
        return CPU_SCORES
    memory = torch.cuda.get_device_properties(device).total_memory
    # A power of two, the same for GPUs of about the same memory: figures depend on it in their last
    # bits.
    return 1 << (memory // GPU_BYTES_PER_SCORE).bit_length() - 1


@dataclass(frozen=True)
class HeadGroup:
    """The kv head that a state is built for, and the group of query heads that share it."""

    layer: int
    sequence: int
    kv_head: int
    rules: LayerRules
    itemsize: int = SERVING_ITEMSIZE
    """Bytes of one element as it is served, whatever the trace holds."""

    @property
    def heads(self) -> slice:
        """The query heads of the group, among the layer's."""
        return slice(self.kv_head * self.rules.group, (self.kv_head + 1) * self.rules.group)

    def place(self, position: int, head: int = 0) -> str:
        """Names a position as one of the heads sees it, by its place in the group."""
        return (
            f"layer {self.layer}, head {self.heads.start + head}, sequence {self.sequence}, "
            f"position {position}"
        )

    @property
    def key_bytes(self) -> float:
        """Bytes of one key."""
        return self.rules.key_dim * self.itemsize

    @property
    def value_bytes(self) -> float:
        """Bytes of one value."""
        return self.rules.value_dim * self.itemsize


@dataclass(frozen=True)
class Unit:
    """One kv head's keys and values with the queries of its group, in float32."""

    group: HeadGroup
    queries: Float32[Tensor, "group queries channels"]
    positions: Int64[Tensor, "queries"]
    """Position of each query, ascending."""
    keys: Float32[Tensor, "keys channels"]
    values: Float32[Tensor, "keys value_channels"]
    sinks: Float32[Tensor, "group"] | None
    """Learned logit per query head, where the layer has them."""
    neighbours: "Neighbours | None" = None
    """The other kv heads and layers of the sequence; None where there is no trace to read."""
    dtype: torch.dtype = torch.float32
    """What the trace holds them in, if that is narrower: they are exact in it."""
    first: int = 0
    """Position in the sequence of the first key, from which all others count."""
    chosen: Int32[Tensor, "queries kept"] | None = None
    """Positions of the keys that a natively sparse model itself attended to, -1 where there are
    fewer; None in a layer that attends to all."""
    key_positions: Int64[Tensor, "keys"] | None = None
    """Positions of the keys in the sequence, ascending, where others between them are gone; queries
    are then counted like the keys, as if nothing had been there."""

    def since(self, first: int) -> "Unit":
        """The unit as if the sequence began at a position, its neighbours too."""
        if not first:
            return self
        neighbours = self.neighbours and self.neighbours.changed(lambda unit: unit.since(first))
        return replace(
            self,
            positions=self.positions - first,
            keys=self.keys[first:],
            values=self.values[first:],
            neighbours=neighbours,
            first=self.first + first,
            chosen=None if self.chosen is None else (self.chosen - first).clamp(min=-1),
        )

    def seal(self) -> Seal:
        """What tells whether its tensors are still as they are now."""
        group = self.group
        place = f"layer {group.layer}, kv head {group.kv_head}, sequence {group.sequence}"
        tensors = {name: getattr(self, name) for name in ("keys", "values", "queries", "positions")}
        tensors |= {} if self.sinks is None else {"sinks": self.sinks}
        tensors |= {} if self.chosen is None else {"keys chosen": self.chosen}
        return Seal({f"the {name} of {place}": tensor for name, tensor in tensors.items()})

    @cached_property
    def places(self) -> list[int]:
        """`positions` as numbers, for which a GPU is waited for once."""
        found: list[int] = self.positions.tolist()
        return found

    @cached_property
    def narrow_keys(self) -> Shaped[Tensor, "keys channels"]:
        """The keys in the dtype of the trace, in which they are exact: half to read for a GPU."""
        return self.keys.to(self.dtype).contiguous()

    @cached_property
    def narrow_values(self) -> Shaped[Tensor, "keys value_channels"]:
        """The values likewise."""
        return self.values.to(self.dtype).contiguous()

    @cached_property
    def longest_keys(self) -> Float64[Tensor, "keys"]:
        """Norm of the longest key up to each position."""
        norms: Tensor = torch.linalg.vector_norm(self.keys, dim=-1).cummax(dim=0).values
        return norms.double()

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What pasts that end at several positions share, by name. It must follow from the unit's
        tensors alone, bit for bit, whichever past was asked first."""
        return {}

    @cached_property
    def mean_values(self) -> Float32[Tensor, "keys value_channels"]:
        """Mean of the values that a query at each position sees."""
        last = torch.arange(len(self.values), device=self.values.device)
        first = first_visible(last, self.group.rules)
        # Along the last axis, since down columns a GPU takes ten times as long.
        sums = self.values.double().T.contiguous().cumsum(dim=-1)
        sums = torch.nn.functional.pad(sums, (1, 0)).T
        mean = (sums[last + 1] - sums[first]) / (last - first + 1)[:, None]
        return mean.to(self.values.dtype)

    def blocks(
        self, first_position: int, elements: int | None = None, together: int = 1
    ) -> Iterator["Block"]:
        """Blocks of about `elements` scores each, those with queries from `first_position` on: they
        begin at the first query of all, so that they are the same whatever the position. None of
        them parts any of so many queries that belong `together`."""
        row_elements = len(self.queries) * len(self.keys)
        if elements is None:
            elements = max(scores_at_once(self.keys.device), LEAST_ROWS * row_elements)
        start = int(torch.searchsorted(self.positions, first_position))
        rows = max(1, elements // row_elements // together) * together
        if start == len(self.positions):
            return
        for row in range(start - start % rows, len(self.positions), rows):
            yield Block(self, slice(row, min(row + rows, len(self.positions))))


def load_units(layer: Layer, sequence: int, device: torch.device) -> Iterator[Unit]:
    """The units of one layer and sequence of a trace, kv head by kv head.

    Raises:
        DamageError: a number is not finite, or so large that it overflows float32; names the first.
    """
    rules = layer.rules
    neighbours = Neighbours.of_trace(layer.trace, sequence, device)
    positions = torch.from_numpy(layer.query_positions(sequence).astype("int64")).to(device)
    for kv_heads in _read_at_once(layer, sequence):
        heads = slice(kv_heads.start * rules.group, kv_heads.stop * rules.group)
        read = {
            "query": layer.query(sequence, heads),
            "key": layer.key(sequence, kv_heads),
            "value": layer.value(sequence, kv_heads),
        }
        query, key, value = (to_torch(array).to(device) for array in read.values())
        tensors, first = (query, key, value), kv_heads.start
        norms = {}
        for (name, array), tensor in zip(read.items(), tensors, strict=True):
            norms[name] = torch.linalg.vector_norm(tensor.float(), dim=-1).cpu().numpy()
            first_head = heads.start if name == "query" else first
            layer.check_vectors(name, sequence, array, norms[name], first_head)
        layer.check_scores(sequence, norms["query"], norms["key"], heads.start)
        chosen = None
        if rules.indexer is not None:
            choices = kv_heads if rules.indexer.groups > 1 else slice(None)
            chosen = torch.from_numpy(layer.selected(sequence, choices)).to(device)
        yield from make_units(
            layer.index,
            sequence,
            rules,
            tensors,
            positions,
            neighbours,
            first_kv_head=first,
            chosen=chosen,
        )


def _read_at_once(layer: Layer, sequence: int) -> Iterator[slice]:
    """The kv heads of a layer, as many at once as `READ_BYTES` hold, and one at least."""
    rules, trace = layer.rules, layer.trace
    elements = trace.length(sequence) * (rules.key_dim + rules.value_dim)
    elements += len(layer.query_positions(sequence)) * rules.group * rules.key_dim
    count = max(1, READ_BYTES // (elements * trace.dtype.itemsize))
    for start in range(0, rules.kv_heads, count):
        yield slice(start, min(start + count, rules.kv_heads))


def make_units(
    layer: int,
    sequence: int,
    rules: LayerRules,
    tensors: tuple[
        Float[Tensor, "heads queries channels"],
        Float[Tensor, "kv_heads keys channels"],
        Float[Tensor, "kv_heads keys value_channels"],
    ],
    positions: Int64[Tensor, "queries"],
    neighbours: "Neighbours | None",
    first_kv_head: int = 0,
    chosen: Int32[Tensor, "choices queries kept"] | None = None,
) -> Iterator[Unit]:
    """The units of queries, keys and values, kv head by kv head: of a whole layer, or of its kv
    heads from one on. What a natively sparse model has `chosen` is one choice for all kv heads, or
    one for each."""
    queries, keys, values = tensors
    for i in range(len(keys)):
        group = HeadGroup(layer, sequence, first_kv_head + i, rules)
        sinks = None
        if rules.sinks is not None:
            sinks = torch.tensor(rules.sinks[group.heads], device=queries.device)
        yield Unit(
            group,
            queries[i * rules.group : (i + 1) * rules.group].float(),
            positions,
            keys[i].float(),
            values[i].float(),
            sinks,
            neighbours,
            queries.dtype if queries.dtype.itemsize < torch.float32.itemsize else torch.float32,
            chosen=None if chosen is None else chosen[i if len(chosen) > 1 else 0],
        )


class Neighbours:
    """The layers of one sequence, each read when it is first asked for."""

    def __init__(
        self,
        layers: tuple[int, ...],
        read: Callable[[int], Iterable[Unit]],
        natively_sparse: bool = False,
    ) -> None:
        self.layers = layers
        """Indices of the layers, ascending."""
        self.natively_sparse = natively_sparse
        """Whether the model itself chooses keys in some of them."""
        self.asked: set[int] = set()
        """Those that were asked for."""
        self._read = read
        self._known: dict[int, tuple[Unit, ...]] = {}
        self._seals: list[Seal] = []

    @classmethod
    def of_trace(cls, trace: Trace, sequence: int, device: torch.device) -> "Neighbours":
        """The recorded layers of a sequence."""
        return cls(
            trace.layers,
            lambda i: load_units(trace.layer(i), sequence, device),
            trace.natively_sparse,
        )

    def units(self, layer: int) -> tuple[Unit, ...]:
        """Every kv head of a layer, in order."""
        self.asked.add(layer)
        if layer not in self._known:
            # Without their neighbours, or a cycle would keep the tensors until it is found.
            alone = tuple(replace(unit, neighbours=None) for unit in self._read(layer))
            self._seals += [unit.seal() for unit in alone]
            self._known[layer] = alone
        return self._known[layer]

    def broken(self) -> Iterator[str]:
        """Names of tensors that were written into since they were read."""
        for seal in self._seals:
            yield from seal.broken()

    def changed(self, change: Callable[[Unit], Unit]) -> "Neighbours":
        """The same, each unit changed when it is read."""
        return Neighbours(
            self.layers, lambda layer: map(change, self.units(layer)), self.natively_sparse
        )


@contextmanager
def intact(*units: Unit) -> Iterator[None]:
    """Refuse that anything is written into what methods are handed of some units, and of the other
    heads and layers through them.

    Raises:
        WrittenInto: something was; in place of any other mistake that may follow from it.
    """
    seals = [unit.seal() for unit in units]

    def written() -> str | None:
        others = (unit.neighbours.broken() for unit in units if unit.neighbours is not None)
        return next(chain(*(seal.broken() for seal in seals), *others), None)

    try:
        yield
    except RetraceError:
        if (what := written()) is not None:
            raise WrittenInto.tensor(what) from None
        raise
    if (what := written()) is not None:
        raise WrittenInto.tensor(what)


class Block:
    """Some consecutive queries of a unit, against all keys that any of them sees.

    What several methods need is computed once, when it is first asked for.
    """

    def __init__(self, unit: Unit, rows: slice, whole: "Block | None" = None) -> None:
        """A part of a `whole` block has its scores: products of fewer queries sum otherwise."""
        self.unit = unit
        self.rows = rows
        self._whole = whole
        self.queries = unit.queries[:, rows]
        self.positions = unit.positions[rows]
        self.end: int = unit.places[min(rows.stop, len(unit.places)) - 1] + 1
        """One past the last key that is visible to any of the queries."""

    @property
    def places(self) -> list[int]:
        """`positions` as numbers, known without waiting for a GPU."""
        return self.unit.places[self.rows]

    @cached_property
    def first_visible(self) -> Int64[Tensor, "queries"]:
        """The first key that each query sees: it sees all from there to its own."""
        return first_visible(self.positions, self.unit.group.rules)

    @cached_property
    def visible(self) -> Bool[Tensor, "queries keys"]:
        """Which keys each query sees."""
        return self.sees(torch.arange(self.end, device=self.positions.device).expand(1, -1))

    def sees(self, ids: Int64[Tensor, "*lists any"]) -> Bool[Tensor, "*queries any"]:
        """Whether each query sees each key of a list (group or 1, queries or 1, listed)."""
        return (ids >= self.first_visible[:, None]) & (ids <= self.positions[:, None])

    @cached_property
    def visible_count(self) -> Int64[Tensor, "queries"]:
        """How many keys each query sees."""
        return self.positions - self.first_visible + 1

    def visible_in(
        self, size: int, first: Tensor | None = None, last: Tensor | None = None
    ) -> Int64[Tensor, "queries pages"]:
        """How many visible keys each page of `size` keys holds; of those from a `first` to a `last`
        one of each query's (queries,)."""
        start = self.first_visible if first is None else torch.maximum(self.first_visible, first)
        stop = self.positions if last is None else torch.minimum(self.positions, last)
        pages = torch.arange(0, self.end, size, device=self.positions.device)
        within = torch.minimum(stop[:, None] - pages + 1, pages.new_tensor(size))
        return (within - (start[:, None] - pages).clamp(min=0)).clamp(min=0)

    def row_of(self, position: int) -> int:
        """The first row of a query at a position or later; the number of rows if there is none."""
        return int(torch.searchsorted(self.positions, position))

    @cached_property
    def scores(self) -> Float32[Tensor, "group queries keys"]:
        """Exact scores, -inf where a key is not visible."""
        if self._whole is not None:
            first = self.rows.start - self._whole.rows.start
            return self._whole.scores[:, first : first + len(self.positions), : self.end]
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

    @cached_property
    def largest_products(self) -> Float64[Tensor, "group queries"]:
        """What no scaled product of a query with a key it sees exceeds: those of their norms. The
        rounding of scores is in proportion to it."""
        norms: Tensor = torch.linalg.vector_norm(self.queries, dim=-1).double()
        return norms * self.unit.longest_keys[self.positions] * abs(self.unit.group.rules.scale)

    def scores_at(
        self, ids: Int64[Tensor, "group queries listed"]
    ) -> Float64[Tensor, "group queries listed"]:
        """Exact scores of key ids; -inf for the id -1.

        The same whether `scores` are known or not, and closer: those are rounded to float32.
        """
        return scores_at(self.queries, self.unit.keys[: self.end], ids, self.unit.group.rules)

    def of(self, unit: Unit) -> "Block":
        """The queries at the same positions of another unit of the sequence."""
        other = Block(unit, self.rows)
        if unit.group.rules == self.unit.group.rules:
            other.__dict__["first_visible"] = self.first_visible
        return other

    def part(self, rows: slice) -> "Block":
        """Some of this block's queries, with what is already computed for them."""
        start, stop, _ = rows.indices(len(self.positions))
        place = slice(self.rows.start + start, self.rows.start + stop)
        part = Block(self.unit, place, self._whole or self)
        part.__dict__["first_visible"] = self.first_visible[rows]
        part.__dict__["visible_count"] = self.visible_count[rows]
        return part
