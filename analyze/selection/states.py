"""Which keys a method's state is built from when it answers a query: never later ones."""

import time
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrace.analyze.caches.view import seen_through
from retrace.analyze.methods.base import (
    BlockMethod,
    EvictionMethod,
    Method,
    ScoreMethod,
    SearchMethod,
)
from retrace.analyze.methods.hooks import calling
from retrace.analyze.methods.options.pooling import LAYER
from retrace.analyze.selection.evictions import Evicted, Evictions
from retrace.analyze.selection.served import Served
from retrace.analyze.units.past import Past, last_of
from retrace.analyze.units.protocol import FIRST_BUILD, Protocol
from retrace.analyze.units.seals import Seal, WrittenInto
from retrace.analyze.units.unit import Block, Unit
from retrace.traces import RetraceError

Calibration = Mapping[tuple[int, int], Mapping[str, Tensor]]
"""What a method's `calibrate` gave, by layer and kv head, on the CPU."""


def of_layer(calibration: Calibration, layer: int) -> Calibration:
    """What of it was given for one layer."""
    return {at: given for at, given in calibration.items() if at[0] == layer}


@dataclass
class Cost:
    """What building a method's states took."""

    builds: int = 0
    seconds: float = 0.0
    state_bytes: int = 0
    """The largest state of one kv head, as replay holds it; what it shares with the sequence's own
    keys, values and queries is not counted."""

    def merge(self, other: "Cost") -> None:
        """Add what was spent elsewhere."""
        self.builds += other.builds
        self.seconds += other.seconds
        self.state_bytes = max(self.state_bytes, other.state_bytes)


class States:
    """A method's state as the queries of one unit advance.

    An index answers with the best of all that it holds. Where a layer has a window or chunks, it
    holds keys only that every query it answers sees: it is built anew from these as the window
    moves by a quarter or by the protocol's R, whichever is less, and as a chunk begins.

    A method that names a cache is handed what that gives back. Where the cache holds the newest
    tokens in full, a state that is fitted, or an index that is extended, sees them as they are when
    that is done; any other is built anew as tokens are rounded.
    """

    def __init__(
        self,
        method: Method,
        unit: Unit,
        protocol: Protocol,
        calibration: Calibration | None = None,
    ) -> None:
        self._method = method
        self._protocol = protocol
        self._unit = unit
        self._calibration = calibration or {}
        # A copy for each kv head, or threads would share what a method writes into them.
        self._learned: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._seals: list[Seal] = []
        # The heads of a layer that select together have a state each.
        self._pools_layer = isinstance(method, ScoreMethod) and method.pool.startswith(LAYER)
        self._units = self._selecting(unit)
        self._states: tuple[Any, ...] = (None,) * len(self._units)
        self._first = 0
        self._built = -1
        self._held = 0
        self._built_at = 0
        """The position at which the states saw the cache when they were built."""
        self._shown: dict[int, tuple[int, Unit, Unit, Seal]] = {}
        """What the cache last gave back of each unit: at which position, and of which unit."""
        self._cost = Cost()
        self._ahead: dict[tuple[int, int], tuple[Any, ...]] = {}
        """States that are built and not yet needed, by their first key and their end."""
        self._evictions: Evictions | None = None
        if protocol.evict is not None and isinstance(method, EvictionMethod):
            with calling("build()", lambda: unit.group.place(0)):
                self._evictions = Evictions(method, unit, protocol, self._build_whole)
        self._on_gpu: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        """When the GPU began and ended each building that is not counted yet."""

    def grow(self, unit: Unit) -> None:
        """Go on with the unit after it has grown by further positions, as in decoding."""
        self._unit = unit
        self._units = self._selecting(unit)
        self._check_shown()

    def _selecting(self, unit: Unit) -> tuple[Unit, ...]:
        """The units that select together."""
        if not self._pools_layer:
            return (unit,)
        return tuple(head.unit for head in Past(unit, 0, len(unit.keys)).heads)

    def serve(self, block: Block) -> Iterator[Served]:
        """The queries of a block, cut where the state changes."""
        own = self._unit.group.kv_head if self._pools_layer else 0
        runs = list(self._runs(block.places))
        self._build_ahead([wanted[:2] for _, wanted in runs])
        for rows, wanted in runs:
            self._advance(*wanted)
            at = wanted[-1]
            heads = [self._seen(unit, at) for unit in self._units] if self._pools_layer else []
            yield Served(
                rows,
                block.part(rows),
                self._states[own],
                self._built,
                self._held,
                self._first,
                tuple(zip(heads, self._states, strict=True)) if self._pools_layer else (),
                self._protocol,
                None if self._method.cache is None else self._seen(self._unit, at),
                at,
            )

    def together(self, block: Block, row: int) -> slice:
        """The rows of a block that are served together with one of them."""
        runs = self._runs(block.places)
        return next(rows for rows, _ in runs if rows.start <= row < rows.stop)

    def _runs(self, positions: list[int]) -> Iterator[tuple[slice, tuple[int, int, int, int]]]:
        """Which consecutive positions are answered by one state, and what `_wanted` says of it."""
        start = 0
        while start < len(positions):
            wanted = self._wanted(positions[start])
            stop = start + 1
            if isinstance(self._method, SearchMethod):  # which may have no index in between
                while stop < len(positions) and self._wanted(positions[stop]) == wanted:
                    stop += 1
            else:  # states never go back, so that few positions have to be looked at
                stop = bisect(positions, wanted, stop, key=self._wanted)
            yield slice(start, stop), wanted
            start = stop

    def _wanted(self, position: int) -> tuple[int, int, int, int]:
        """The first key of the state at a position, the end of those that it is built from, and of
        all that it holds; and the first position whose query finds the same in the cache."""
        return *self._held_at(position), self._cached_at(position)

    def _cached_at(self, position: int) -> int:
        """The first position whose query finds the same tokens rounded as the one at a position."""
        cache = self._method.cache
        if cache is None or cache.step is None:
            return 0
        return position - position % cache.step

    def _held_at(self, position: int) -> tuple[int, int, int]:
        """The first key of the state at a position, the end of those that it is built from, and of
        all that it holds."""
        method, length = self._method, len(self._unit.keys)
        if isinstance(method, BlockMethod) and method.looks == "end":
            end = self._protocol.chunk_of(position, length)[1]
            return 0, end, end
        if not method.fitted:
            return 0, length, length
        if self._evictions is not None:
            number = self._protocol.evictions(position, length)
            built = self._evictions.end(number - 1) if number > 0 else 0
            return 0, built, built
        if isinstance(method, SearchMethod):
            first, built = self._indexed(method, position)
            if not first < built <= position:
                return 0, 0, 0
            return first, built, built + (position - built) // method.step * method.step
        built = self._protocol.built_at(position, length)
        if isinstance(method, ScoreMethod) and method.keeps_new:
            return 0, built, built
        # Scores of later keys are hidden query by query, so that all may join at once.
        return 0, built, length if built else 0

    def _indexed(self, method: SearchMethod, position: int) -> tuple[int, int]:
        """The first key of the index at a position, and the end of those that it is built from;
        there is none before that."""
        protocol, rules = self._protocol, self._unit.group.rules
        first = rules.first_visible(position)
        if not first and method.incremental and protocol.prefix is None:
            return 0, FIRST_BUILD
        built = protocol.built_at(position, len(self._unit.keys))
        if not first:
            return 0, built
        if rules.window is not None:
            step = max(1, min(protocol.rebuild, rules.window // 4))
            first = -(-first // step) * step
            # Where the window, which is whole when it begins to move, first leaves all before.
            since = max(first + FIRST_BUILD, first - step + rules.window)
        elif method.incremental:
            since = first + FIRST_BUILD
        else:  # a chunk is a sequence of its own
            since = first + replace(protocol, prefix=None).built_at(position - first, 0)
        return first, since if protocol.prefix is None else max(built, since)

    def _advance(self, first: int, built: int, held: int, at: int) -> None:
        built_at = self._cached_at(built) if self._method.fitted else at
        state = first, built, built_at
        known = state == (self._first, self._built, self._built_at)
        if known and held == self._held:
            return
        if self._evictions is not None:
            number = self._protocol.evictions(built, len(self._unit.keys)) - 1
            last = Evicted(self._evictions, number) if built else None
            self._states = (last,) * len(self._units)
            self._first, self._built, self._held = first, built, held
            self._cost.builds += 1
            return
        with self._timed():
            if not known:
                self._states = (None,) * len(self._units)
                if first < built:
                    pasts = (self._past(u, first, first, built, built_at) for u in self._units)
                    ahead = self._ahead.pop((first, built), None)
                    self._states = tuple(map(self._build, pasts)) if ahead is None else ahead
                    self._cost.builds += 1
                self._first, self._built, self._built_at = state
                self._held = built
            if held > self._held:
                # An index gains keys as they come; elsewhere all join, whose queries come later.
                joins_at = built_at
                if isinstance(self._method, SearchMethod):
                    joins_at = self._cached_at(held)
                self._states = tuple(
                    self._extend(state, self._past(unit, first, self._held, held, joins_at))
                    for unit, state in zip(self._units, self._states, strict=True)
                )
                self._held = held
        seen = self._seen(self._units[0], built_at)
        self._cost.state_bytes = max(self._cost.state_bytes, _nbytes(self._states[0], seen))

    def _build_ahead(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Build the states of a block, of all that begin at the same key together, where the method
        says how."""
        self._ahead.clear()
        if self._evictions is not None or type(self._method).build_each is Method.build_each:
            return
        if self._method.cache is not None and self._method.cache.step is not None:
            return  # pasts of one unit that see other keys have nothing in common
        new = [(a, b) for a, b in wanted if a < b and (a, b) != (self._first, self._built)]
        for first in sorted({first for first, _ in new}):
            ends = sorted({built for start, built in new if start == first})
            pasts = [self._past(unit, first, first, end, 0) for unit in self._units for end in ends]
            states = self._build_together(pasts)
            for i, end in enumerate(ends):
                self._ahead[first, end] = tuple(states[i :: len(ends)])

    def _build_together(self, pasts: list[Past]) -> list[Any]:
        with self._timed(), calling("build_each()", lambda: last_of(pasts[-1])):
            states = self._method.build_each(pasts)
        return [_state(s, "build_each()", past) for s, past in zip(states, pasts, strict=True)]

    def _build(self, past: Past) -> Any:
        with calling("build()", lambda: last_of(past)):
            state = self._method.build(past)
        return _state(state, "build()", past)

    def _build_whole(self, unit: Unit) -> Any:
        return self._build(self._past(unit, 0, 0, len(unit.keys), 0))

    def _extend(self, state: Any, new: Past) -> Any:
        with calling("extend()", lambda: last_of(new)):
            state = self._method.extend(state, new)
        return _state(state, "extend()", new)

    def _seen(self, unit: Unit, at: int) -> Unit:
        """A unit as the method sees it: as its cache gives it back to the query at a position."""
        cache = self._method.cache
        if cache is None:
            return unit
        known = self._shown.get(id(unit))
        if known is None or known[0] != at:
            self._check_shown(id(unit))
            shown = seen_through(unit, cache, at)
            known = self._shown[id(unit)] = at, unit, shown, shown.seal()
        return known[2]

    def _check_shown(self, *units: int) -> None:
        """Refuse a method that wrote into what its cache gave back, of some units or of all, and
        forget that."""
        for place in units or tuple(self._shown):
            known = self._shown.pop(place, None)
            if known is None:
                continue
            _, _, shown, seal = known
            for what in (*seal.broken(), *(shown.neighbours.broken() if shown.neighbours else ())):
                raise WrittenInto.tensor(what)

    def _past(self, unit: Unit, first: int, start: int, end: int, at: int) -> Past:
        """Positions of a unit from `start` to `end`, counted from `first` on, as the method sees
        them at position `at`."""
        place = unit.group.layer, unit.group.kv_head
        if place not in self._learned:
            learned = self._calibration.get(place, {})
            copies = {n: t.to(unit.keys.device, copy=True) for n, t in learned.items()}
            self._seals.append(Seal({f"past.calibration[{n!r}]": t for n, t in copies.items()}))
            self._learned[place] = copies
        here = dict(self._learned[place])
        return Past(self._seen(unit, at).since(first), start - first, end - first, here)

    def check_calibration(self) -> None:
        """Refuse a method that wrote into what it had learned, or what its cache gave back."""
        self._check_shown()
        for seal in self._seals:
            for what in seal.broken():
                raise WrittenInto.tensor(what)

    @property
    def cost(self) -> Cost:
        """What building has taken so far. A GPU is waited for."""
        for begin, end in self._on_gpu:
            end.synchronize()
            self._cost.seconds += begin.elapsed_time(end) / 1e3
        self._on_gpu.clear()
        return self._cost

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count what runs inside as building: on a GPU by its own events, so that it goes on."""
        if self._unit.keys.is_cuda:
            with torch.cuda.device(self._unit.keys.device):
                begin, end = _event(), _event()
                begin.record()
                yield
                end.record()
            self._on_gpu.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._cost.seconds += time.perf_counter() - start


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _state(state: Any, hook: str, past: Past) -> Any:
    if state is None:  # which would stand for no state, and be answered by exact search
        raise RetraceError(f"{hook} gave None at {last_of(past)}; expected a state to go on with.")
    return state


def _nbytes(state: Any, unit: Unit) -> int:
    """Bytes of the tensors and arrays in a state, less what it shares with the unit."""
    shared = {t.untyped_storage().data_ptr() for t in (unit.keys, unit.values, unit.queries)}

    def count(part: Any) -> int:
        if isinstance(part, Tensor):
            mine = part.untyped_storage().data_ptr() not in shared
            return part.nbytes if mine else 0
        if isinstance(part, np.ndarray):
            return part.nbytes
        if isinstance(part, Mapping):
            return sum(map(count, part.values()))
        if isinstance(part, list | tuple):
            return sum(map(count, part))
        if is_dataclass(part) and not isinstance(part, Past | Unit):
            return sum(count(getattr(part, f.name)) for f in fields(part))
        return 0

    return count(state)
