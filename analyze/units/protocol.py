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
    `prefill:B`: every query, in blocks of B from the sequence's first on, of which a method sees
    each whole, and the end of the prompt where it says so: the whole sequence is one prompt.
    `prefill:B:chunk=C`: the prompt is read C queries at a time, and of its end only that of the
    chunk that a query is in is there to be seen.
    """

    rebuild: int = 256
    prefix: int | float | None = None
    block: int | None = None
    """Queries of a block that are answered together; None where each is answered alone."""
    chunk: int | None = None
    """Queries of a prompt that are read at once; None for all of them."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `all`, `all:512`, `prefix:1024`, `prefix:0.5`, `prefill:128` or
        `prefill:128:chunk=2048`."""
        if match := re.fullmatch(r"all(?::(\d{1,18}))?", text):
            rebuild = int(match[1] or cls.rebuild)
            if rebuild >= FIRST_BUILD:
                return cls(rebuild=rebuild)
        elif match := re.fullmatch(r"prefix:(\d{1,18}|0?\.\d+)", text):
            at = match[1]
            if float(at) > 0:
                return cls(prefix=float(at) if "." in at else int(at))
        elif match := re.fullmatch(r"prefill:(\d{1,9})(?::chunk=(\d{1,9}))?", text):
            block, chunk = int(match[1]), int(match[2]) if match[2] else None
            if block > 0 and (chunk is None or (chunk > 0 and chunk % block == 0)):
                return cls(block=block, chunk=chunk)
        raise RetraceError(
            f"Protocol {text!r}: expected all, all:R (R >= {FIRST_BUILD}), prefix:POSITION, "
            "prefix:FRACTION, prefill:B or prefill:B:chunk=C (C a multiple of B)."
        )

    def first_query(self, length: int) -> int:
        """The first position that is answered in a sequence of this length."""
        if self.prefix is None:
            return 0
        return int(self.prefix * length) if isinstance(self.prefix, float) else self.prefix

    def built_at(self, position: int, length: int) -> int:
        """How many keys a fitted state is built from, for the query at this position; in a prefill,
        how many come before the query's block."""
        if self.block is not None:
            return position - position % self.block
        if self.prefix is not None:
            return min(self.first_query(length), position)
        if position >= self.rebuild:
            return position - position % self.rebuild
        return 1 << (position.bit_length() - 1) if position >= FIRST_BUILD else 0

    def chunk_of(self, position: int, length: int) -> tuple[int, int]:
        """Where the part of a prompt of this length that is read together with the query at this
        position begins, and one past its end."""
        if self.chunk is None:
            return 0, length
        first = position - position % self.chunk
        return first, min(first + self.chunk, length)

    def __str__(self) -> str:
        if self.block is not None:
            chunk = "" if self.chunk is None else f":chunk={self.chunk}"
            return f"prefill:{self.block}{chunk}"
        return f"all:{self.rebuild}" if self.prefix is None else f"prefix:{self.prefix}"
