"""What is left of a sequence's keys as a model decodes: what an eviction drops is gone for good."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retrace.analyze.methods.base import EvictionMethod, Method
from retrace.analyze.methods.options.pooling import LAYER
from retrace.analyze.selection.by_eviction import ends_of_pasts
from retrace.analyze.selection.by_score import select_by_score
from retrace.analyze.selection.merging import RULES, Held
from retrace.analyze.selection.served import Served
from retrace.analyze.units.past import Past
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Unit
from retrace.traces import RetraceError


@dataclass(frozen=True)
class Left:
    """What an eviction leaves of the keys of one kv head, under one budget."""

    ids: Tensor
    """Positions in the sequence (keys,) int64, in the method's own order."""
    first_given: int
    """From this position on keys did not have to be found: they are kept as recent ones."""
    importance: Tensor | None
    """Of each key (group or 1, keys), by ascending position, where importance accumulates."""
    held: Held | None
    """What the cache holds of them, where dropped ones are merged into them."""


class Evictions:
    """The evictions of one layer of a sequence, each judging what the one before left and the keys
    that came since, budget by budget and kv head by kv head."""

    def __init__(
        self,
        method: EvictionMethod,
        unit: Unit,
        protocol: Protocol,
        build: Callable[[Unit], Any],
    ) -> None:
        """`build` gives the method's state of a whole unit.

        Raises:
            RetraceError: what the method leaves is not defined here.
        """
        rules = unit.group.rules
        if rules.window is not None or rules.chunk is not None:
            raise RetraceError(
                f"drops keys while decoding, and layer {unit.group.layer} ({rules.module}) sees "
                "its last keys only: name others (--layers), or give --protocol prefix:P."
            )
        if type(method).aux_bytes is not Method.aux_bytes:
            raise RetraceError(
                "counts bytes of a state, which the protocol decode:R does not ask for."
            )
        if method.cache is not None:
            raise RetraceError(
                f"cache={method.cache} is not followed through evictions: give --protocol prefix:P."
            )
        if method.output != "renorm":
            raise RetraceError(f"output={method.output} is not defined where keys are gone.")
        if method.merge != "none" and rules.cached_bytes is not None:
            raise RetraceError(
                f"merge={method.merge}: the heads of layer {unit.group.layer} share one cache, in "
                "which keys and values cannot be merged head by head. Name other layers."
            )
        self._unit = unit
        self._protocol = protocol
        self._build = build
        length = len(unit.keys)
        self.prompt = protocol.first_query(length) if method.keep.prompt else 0
        """Keys before the first eviction, where they are kept besides the budget."""
        if self.prompt:
            keep = replace(method.keep, prompt=False, sink=self.prompt, sink_most=None)
            method = replace(method, keep=keep)
        self._method = method
        self._known: dict[tuple[int, int, int], Left] = {}

    def end(self, number: int) -> int:
        """Where the past ends that an eviction judges, counted from 0."""
        assert self._protocol.evict is not None
        return self._protocol.first_query(len(self._unit.keys)) + number * self._protocol.evict

    def left(self, number: int, k: int) -> Left:
        """What an eviction, counted from 0, leaves of the unit's own keys under a budget."""
        return self._left(self._unit, number, k)

    def _left(self, unit: Unit, number: int, k: int) -> Left:
        head, first = unit.group.kv_head, number
        # One after the other: there may be more of them than functions can call each other.
        while first > 0 and (head, first - 1, k) not in self._known:
            first -= 1
        for n in range(first, number + 1):
            if (head, n, k) not in self._known:
                self._known[head, n, k] = self._judged(unit, n, k)
        return self._known[head, number, k]

    def _judged(self, unit: Unit, number: int, k: int) -> Left:
        method, there = self._method, self._there(unit, number, k)
        with_neighbours = unit.neighbours or self._unit.neighbours
        judged = replace(
            there,
            neighbours=with_neighbours
            and with_neighbours.changed(lambda other: self._other(other, there, number, k)),
        )
        state = self._state(judged, number, k)
        count = len(judged.keys)
        heads: tuple[tuple[Unit, Any], ...] = ()
        if method.pool.startswith(LAYER):
            every = (past.unit for past in Past(judged, 0, count).heads)
            heads = tuple((head, self._state(head, number, k)) for head in every)
        ended = ends_of_pasts(judged, [count])
        rows = slice(0, 1)
        served = Served(rows, ended, state, count, count, 0, _ended(heads, count))
        (selection,) = select_by_score(method, [served], ended, [k + self.prompt])
        ids, attended = selection.ids[:, 0], selection.attended[0, :, 0]
        if not bool((ids == ids[:1]).all()) or not bool((attended == attended[0]).all()):
            raise RetraceError(
                "keeps keys of its own for each query head, and what decode:R drops is gone for "
                "all heads of a group: give pool=mean or another that makes them agree."
            )
        chosen = ids[0, : int(attended[0])]
        chosen = chosen[chosen >= 0]
        position = judged.key_positions
        assert position is not None
        first_given = self.end(number)
        if selection.first_given is not None:
            given = max(0, int(selection.first_given[0, 0]))  # more are kept than there are
            first_given = int(position[given]) if given < count else first_given
        kept = chosen.sort().values
        importance = state[:, kept] if method.accumulates else None
        held = None
        if method.merge != "none":
            before = self._held(unit, number - 1, k)
            memory = None if before is None else before.memory
            held = RULES[method.merge](Past(judged, 0, count), kept, memory)
        return Left(position[chosen], first_given, importance, held)

    def _held(self, unit: Unit, number: int, k: int) -> Held | None:
        """What the cache holds of what an eviction left; None before the first, and where nothing
        is merged."""
        return None if number < 0 else self._left(unit, number, k).held

    def _state(self, unit: Unit, number: int, k: int) -> Any:
        """The method's state of what an eviction judges."""
        state = self._build(unit)
        if not self._method.accumulates or not number:
            return state
        before = self._known[unit.group.kv_head, number - 1, k].importance
        assert before is not None
        return state + torch.nn.functional.pad(before, (0, state.shape[-1] - before.shape[-1]))

    def _there(self, unit: Unit, number: int, k: int) -> Unit:
        """The keys of a kv head that an eviction judges, and the queries since the one before."""
        device, end = unit.keys.device, self.end(number)
        since, kept = 0, torch.empty(0, dtype=torch.int64, device=device)
        if number:
            since = self.end(number - 1)
            kept = self._left(unit, number - 1, k).ids.sort().values
        positions = torch.cat([kept, torch.arange(since, end, device=device)])
        bounds = torch.tensor([since, end], device=unit.positions.device)
        rows = slice(*torch.searchsorted(unit.positions, bounds).tolist())
        keys, values = unit.keys[positions], unit.values[positions]
        if (held := self._held(unit, number - 1, k)) is not None:
            keys[: len(kept)], values[: len(kept)] = held.keys, held.values
        return replace(
            unit,
            queries=unit.queries[:, rows],
            positions=unit.positions[rows] - since + len(kept),
            keys=keys,
            values=values,
            chosen=None,
            key_positions=positions,
        )

    def _other(self, other: Unit, own: Unit, number: int, k: int) -> Unit:
        """What another kv head of the layer has there."""
        if other.group.layer != self._unit.group.layer:
            raise RetraceError(
                "looks at other layers, whose evictions the protocol decode:R does not follow."
            )
        if other.group.kv_head == own.group.kv_head:
            return replace(own, neighbours=None)
        there = self._there(other, number, k)
        if len(there.keys) != len(own.keys):
            raise RetraceError(
                "looks at all kv heads of a layer at once, and leaves them different numbers of "
                "keys: it has no order in which decode:R could judge them."
            )
        return there


@dataclass(frozen=True)
class Evicted:
    """The state of a method that evicts while a model decodes: which eviction came last."""

    evictions: Evictions
    number: int
    """Counted from 0."""


def _ended(heads: tuple[tuple[Unit, Any], ...], count: int) -> tuple[tuple[Unit, Any], ...]:
    """The heads of a layer, as a query at the end of their pasts meets them."""
    return tuple((ends_of_pasts(head, [count]).unit, state) for head, state in heads)
