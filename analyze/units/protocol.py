"""Which keys a method's state may be built from when it answers a query: never later ones."""

import re
from dataclasses import dataclass
from typing import Self

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
        if match := re.fullmatch(r"all(?::(\d{1,18}))?", text):
            rebuild = int(match[1] or cls.rebuild)
            if rebuild >= FIRST_BUILD:
                return cls(rebuild=rebuild)
        elif match := re.fullmatch(r"prefix:(\d{1,18}|0?\.\d+)", text):
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
