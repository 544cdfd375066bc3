"""Which keys a method's state is built from when it answers a query: never later ones."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from retrace.analyze.methods.base import Method, SearchMethod
from retrace.analyze.unit import Block, Unit
from retrace.traces import RetraceError

FIRST_BUILD = 16
"""Keys in the first state that is built under the protocol `all`; later ones double."""


@dataclass(frozen=True)
class Protocol:
    """Which queries are answered, and from what state.

    `all` or `all:R`: every counted query. A fitted state is rebuilt at 16, 32, 64, ... keys and
    from R on at every R-th position, always on what came before.
    `prefix:P`: only queries from position P on (or from that fraction of the sequence), with a
    fitted state built at P and extended by the method's own update rule: the decoding case.
    """

    rebuild: int = 256
    prefix: int | float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `all`, `all:512`, `prefix:1024` or `prefix:0.5`."""
        if match := re.fullmatch(r"all(?::(\d+))?", text):
            rebuild = int(match[1] or cls.rebuild)
            if rebuild >= FIRST_BUILD:
                return cls(rebuild=rebuild)
        elif match := re.fullmatch(r"prefix:(\d+|0?\.\d+)", text):
            at = match[1]
            if float(at) > 0:
                return cls(prefix=float(at) if "." in at else int(at))
        raise RetraceError(
            f"Protocol {text!r}: expected all, all:R (R >= {FIRST_BUILD}), prefix:POSITION or "
            "prefix:FRACTION."
        )

    def first_query(self, length: int) -> int:
        """The first position that is answered in a sequence of this length."""
        if self.prefix is None:
            return 0
        return int(self.prefix * length) if isinstance(self.prefix, float) else self.prefix

    def built_at(self, position: int, length: int) -> int:
        """How many keys a fitted state is built from, for the query at this position."""
        if self.prefix is not None:
            return min(self.first_query(length), position)
        if position >= self.rebuild:
            return position - position % self.rebuild
        return 1 << (position.bit_length() - 1) if position >= FIRST_BUILD else 0

    def __str__(self) -> str:
        return f"all:{self.rebuild}" if self.prefix is None else f"prefix:{self.prefix}"


class States:
    """A method's state as the queries of one unit advance."""

    def __init__(self, method: Method, unit: Unit, protocol: Protocol) -> None:
        self._method = method
        self._unit = unit
        self._protocol = protocol
        self._built = -1
        self._held = 0
        self._state: Any = None

    def serve(self, block: Block) -> Iterator[tuple[slice, Any, int]]:
        """The queries of a block, cut where the state changes: which, the state, keys in it."""
        if not self._method.fitted:
            if self._state is None:
                self._state = self._method.build(
                    self._unit.keys, self._unit.values, self._unit.group
                )
            yield slice(0, len(block.positions)), self._state, len(self._unit.keys)
            return
        wanted = [self._wanted(position) for position in block.positions.tolist()]
        start = 0
        for row in range(1, len(wanted) + 1):
            if row == len(wanted) or wanted[row] != wanted[start]:
                self._advance(*wanted[start])
                yield slice(start, row), self._state, self._held
                start = row

    def _wanted(self, position: int) -> tuple[int, int]:
        """How many keys the state at a position is built from, and how many it holds in all."""
        length = len(self._unit.keys)
        built = self._protocol.built_at(position, length)
        if isinstance(self._method, SearchMethod):
            if self._method.incremental and self._protocol.prefix is None:
                built = FIRST_BUILD if position >= FIRST_BUILD else 0
            step = self._method.step
            return built, built + (position - built) // step * step if built else 0
        # Scores of later keys are hidden query by query, so that all may join at once.
        return built, length if built else 0

    def _advance(self, built: int, held: int) -> None:
        keys, values, group = self._unit.keys, self._unit.values, self._unit.group
        if built != self._built:
            self._state = None
            if built:
                self._state = self._method.build(keys[:built], values[:built], group)
            self._built = self._held = built
        if held > self._held:
            more = slice(self._held, held)
            self._state = self._method.extend(self._state, keys[more], values[more], group)
            self._held = held
