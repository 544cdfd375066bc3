"""What a method's state is built from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from retrace.analyze.units.attention import log_normalizer, softcap, unseen
from retrace.analyze.units.unit import HeadGroup, Unit
from retrace.traces import RetraceError, Rotation

SUMMED = 256
"""Queries whose attention is held at once, to be summed."""


@dataclass
class _Sums:
    """Attention received so far, from queries of whole runs."""

    total: Tensor | None = None
    """(group, all keys of the unit)"""
    queries: int = 0


@dataclass(frozen=True)
class Past:
    """One kv head's keys, values and queries at the positions from `start` up to `end`.

    A fitted state is built from the Past that ends where the state is built, so that whatever is
    read through it, from other kv heads and layers too, comes before the queries it answers.
    """

    unit: Unit = field(repr=False)
    start: int
    end: int
    """One past the last position."""
    calibration: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """What the method's `calibrate` gave for this layer and kv head."""

    @property
    def whole(self) -> "Past":
        """The same from the sequence's first position: of what has come since, all so far."""
        return replace(self, start=0)

    @property
    def hidden(self) -> int:
        """How many of its first keys no query from its end on sees, since the layer's window or
        chunks have left them: a cache need not hold them."""
        return min(max(0, self.group.rules.first_visible(self.end) - self.start), len(self.keys))

    @property
    def group(self) -> HeadGroup:
        """The kv head and the query heads that share it."""
        return self.unit.group

    @property
    def keys(self) -> Float32[Tensor, "keys channels"]:
        """As attention sees them."""
        return self.unit.keys[self.start : self.end]

    @property
    def values(self) -> Float32[Tensor, "keys value_channels"]:
        """Of the same keys."""
        return self.unit.values[self.start : self.end]

    @property
    def query_positions(self) -> Int64[Tensor, "queries"]:
        """Positions of the queries, ascending; a trace may hold only some."""
        return self.unit.positions[self._rows]

    @cached_property
    def queries(self) -> Float32[Tensor, "group queries channels"]:
        """The queries of the group, scaled as the layer scales them: their products with keys are
        logits."""
        return self.unit.queries[:, self._rows] * self.group.rules.scale

    def queries_at(
        self, positions: Int64[Tensor, "rows"], heads: int
    ) -> Float32[Tensor, "{heads} rows channels"]:
        """The queries at these of their positions, or one mean of the group where fewer heads are
        asked for."""
        queries = self.queries[:, torch.searchsorted(self.query_positions, positions)]
        return queries if heads == len(queries) else queries.mean(dim=0, keepdim=True)

    @property
    def natively_sparse(self) -> bool:
        """Whether the model itself chooses, in this or another layer, which keys it attends to."""
        neighbours = self.unit.neighbours
        return self.group.rules.indexer is not None or (
            neighbours is not None and neighbours.natively_sparse
        )

    def chosen_at(self, positions: Int64[Tensor, "rows"]) -> Int64[Tensor, "rows kept"]:
        """Positions of the keys that the natively sparse model itself attended to, -1 where there
        are fewer, for queries at these of their positions.

        Raises:
            RetraceError: the trace does not say.
        """
        chosen = self.unit.chosen
        if chosen is None:
            raise RetraceError(
                "needs the keys that the model itself chose, which are not known: only a trace of "
                "a natively sparse model has them."
            )
        return chosen[torch.searchsorted(self.unit.positions, positions)].long()

    @cached_property
    def keys_before_rotation(self) -> Float32[Tensor, "keys channels"]:
        """The keys before position encoding."""
        positions = torch.arange(self.start, self.end)
        return self._turned(self._rotation.undo, self.keys, positions)

    @cached_property
    def queries_before_rotation(self) -> Float32[Tensor, "group queries channels"]:
        """The scaled queries before position encoding."""
        return self._turned(self._rotation.undo, self.queries, self.query_positions)

    def rotated(
        self, vectors: Float[Tensor, "*heads rows channels"], positions: Int64[Tensor, "rows"]
    ) -> Float[Tensor, "*heads rows channels"]:
        """Vectors with the layer's position encoding for `positions`."""
        return self._turned(self._rotation.apply, vectors, positions)

    @cached_property
    def heads(self) -> tuple["Past", ...]:
        """The same positions of every kv head of this layer, in order."""
        if self.unit.neighbours is None and self.group.rules.kv_heads == 1:
            return (self,)
        return self.layer(self.group.layer)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the recorded layers, ascending."""
        neighbours = self.unit.neighbours
        return (self.group.layer,) if neighbours is None else neighbours.layers

    def layer(self, index: int) -> tuple["Past", ...]:
        """The same positions of every kv head of another recorded layer, in order."""
        neighbours = self.unit.neighbours
        if neighbours is None:
            raise RetraceError("needs other heads or layers, which are read from a trace only.")
        return tuple(
            Past(replace(unit, neighbours=neighbours), self.start, self.end)
            for unit in neighbours.units(index)
        )

    def asked(
        self, rows: slice | Int64[Tensor, "rows"]
    ) -> tuple[Float32[Tensor, "group rows channels"], Int64[Tensor, "rows"]]:
        """Some of the queries, scaled, and their positions.

        Raises:
            RetraceError: the trace holds no query of these positions.
        """
        positions = self.query_positions[rows]
        if not len(positions):
            raise RetraceError(
                f"judges keys by queries before position {self.end}, and the trace holds none: "
                "capture more of them (--queries), or begin later with --protocol prefix:P."
            )
        return self._asked(rows), positions

    def _asked(self, rows: slice | Int64[Tensor, "rows"]) -> Float32[Tensor, "group rows channels"]:
        """Some of the queries, scaled. Those that are asked for alone are."""
        if "queries" in self.__dict__:
            return self.queries[:, rows]
        return self.unit.queries[:, self._rows][:, rows] * self.group.rules.scale

    def attention(self, rows: slice | Int64[Tensor, "rows"]) -> Float32[Tensor, "group rows keys"]:
        """Exact attention probabilities of some of the queries over the keys; 0 where a query does
        not see a key. `slice(-32, None)` are the last 32 queries.

        Raises:
            RetraceError: the trace holds no query of these positions.
        """
        queries, positions = self.asked(rows)
        return self._probabilities(queries @ self.keys.T, positions, self.unit.sinks)

    def layer_attention(
        self, rows: slice | Int64[Tensor, "rows"]
    ) -> Float32[Tensor, "kv_heads group rows keys"]:
        """The same of every kv head of the layer, in order."""
        heads = self.heads
        _, positions = self.asked(rows)
        queries = torch.stack([head._asked(rows) for head in heads])
        keys = torch.stack([head.keys for head in heads])
        sinks = [head.unit.sinks for head in heads if head.unit.sinks is not None]
        scores = (queries.flatten(1, 2) @ keys.mT).view(*queries.shape[:3], -1)
        found = self._probabilities(
            scores.flatten(0, 1), positions, torch.cat(sinks) if sinks else None
        )
        return found.view_as(scores)

    def _probabilities(
        self,
        products: Float32[Tensor, "heads rows keys"],
        positions: Int64[Tensor, "rows"],
        sinks: Float32[Tensor, "heads"] | None,
    ) -> Float32[Tensor, "heads rows keys"]:
        rules = self.group.rules
        keys = torch.arange(self.start, self.end, device=positions.device)
        scores = softcap(products, rules)
        scores = scores.masked_fill_(unseen(positions, keys, rules), -torch.inf)
        if sinks is None:
            return torch.softmax(scores, dim=-1)
        return torch.exp(scores - log_normalizer(scores, sinks)[..., None])

    def attention_received(self) -> Float32[Tensor, "group keys"]:
        """Exact attention that each key received from all queries of a past that begins with the
        sequence, summed.

        Pasts of one unit share the sum over `SUMMED` queries and as many again, which depends on
        none that come later: one that ends later adds what came since.
        """
        count = len(self.query_positions)
        whole = count - count % SUMMED
        sums: _Sums = self.unit.shared.get("attention_received", _Sums())
        if sums.total is None or sums.queries > whole:
            heads, keys = len(self.unit.queries), len(self.unit.keys)
            sums = _Sums(self.unit.keys.new_zeros(heads, keys))
        assert sums.total is not None
        for start in range(sums.queries, whole, SUMMED):
            self._add_received(sums.total, slice(start, start + SUMMED))
        sums.queries = whole
        self.unit.shared["attention_received"] = sums
        received = sums.total[:, : self.end].clone()
        if whole < count:
            self._add_received(received, slice(whole, count))
        return received

    def _add_received(self, total: Float32[Tensor, "group any"], rows: slice) -> None:
        """Add what the keys that some queries see received from them."""
        last = rows.stop - 1
        if not self._all_asked:
            last = int(self.query_positions[last])
        seen = replace(self, end=last + 1)
        total[:, : seen.end] += seen.attention(rows).sum(dim=1)

    @property
    def _all_asked(self) -> bool:
        """Whether the unit has the query of every position of the sequence."""
        return len(self.unit.positions) == self.unit.first + len(self.unit.keys)

    @property
    def _rows(self) -> slice:
        if self._all_asked:  # no need to wait for a GPU
            return slice(self.unit.first + self.start, self.unit.first + self.end)
        bounds = torch.tensor([self.start, self.end], device=self.unit.positions.device)
        return slice(*torch.searchsorted(self.unit.positions, bounds).tolist())

    @property
    def _rotation(self) -> Rotation:
        rotation = self.group.rules.rotation
        if rotation is None:
            raise RetraceError(
                f"needs keys before position encoding, but how layer {self.group.layer} "
                f"({self.group.rules.module}) encodes positions is not known."
            )
        return rotation

    def _turned(
        self,
        turn: Callable[[npt.NDArray[Any], npt.NDArray[Any]], npt.NDArray[Any]],
        vectors: Float[Tensor, "*heads rows channels"],
        positions: Int64[Tensor, "rows"],
    ) -> Float[Tensor, "*heads rows channels"]:
        turned = turn(vectors.cpu().numpy(), self.in_sequence(positions).cpu().numpy())
        return torch.from_numpy(np.asarray(turned)).to(vectors)

    def in_sequence(self, positions: Int64[Tensor, "rows"]) -> Int64[Tensor, "rows"]:
        """Where positions, as the past counts them, are in the sequence: others may have come
        before its first key, and keys between its own may be gone."""
        held = self.unit.key_positions
        if held is None:
            return positions + self.unit.first
        positions, last = positions.to(held.device), len(held) - 1
        return held[positions.clamp(max=last)] + (positions - last).clamp(min=0)


def last_of(past: Past) -> str:
    """Names the last position of a past."""
    return past.group.place(int(past.in_sequence(torch.tensor([past.end - 1]))))
