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
    `decode:R:from=P`: as `prefix:P`, but a method that evicts drops keys at P and at every R-th
    position since, each time among what it left before and the keys that came: what is dropped is
    gone. `decode:R` begins at R.
    `prefill:B`: every query, in blocks of B from the sequence's first on, of which a method sees
    each whole, and the end of the prompt where it says so: the whole sequence is one prompt.
    `prefill:B:chunk=C`: the prompt is read C queries at a time, and of its end only that of the
    chunk that a query is in is there to be seen.
    """

    rebuild: int = 256
    prefix: int | float | None = None
    evict: int | None = None
    """Positions from one eviction to the next; None where a past is judged once."""
    block: int | None = None
    """Queries of a block that are answered together; None where each is answered alone."""
    chunk: int | None = None
    """Queries of a prompt that are read at once; None for all of them."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `all`, `all:512`, `prefix:1024`, `prefix:0.5`, `decode:128`, `decode:128:from=1024`,
        `prefill:128` or `prefill:128:chunk=2048`."""
        if match := re.fullmatch(r"all(?::(\d{1,18}))?", text):
            rebuild = int(match[1] or cls.rebuild)
            if rebuild >= FIRST_BUILD:
                return cls(rebuild=rebuild)
        elif match := re.fullmatch(r"(?:prefix:|decode:(\d{1,9}):from=)(\d{1,18}|0?\.\d+)", text):
            evict, at = int(match[1]) if match[1] else None, match[2]
            if float(at) > 0 and evict != 0:
                return cls(prefix=float(at) if "." in at else int(at), evict=evict)
        elif match := re.fullmatch(r"decode:(\d{1,9})", text):
            if (evict := int(match[1])) > 0:
                return cls(prefix=evict, evict=evict)
        elif match := re.fullmatch(r"prefill:(\d{1,9})(?::chunk=(\d{1,9}))?", text):
            block, chunk = int(match[1]), int(match[2]) if match[2] else None
            if block > 0 and (chunk is None or (chunk > 0 and chunk % block == 0)):
                return cls(block=block, chunk=chunk)
        raise RetraceError(
            f"Protocol {text!r}: expected all, all:R (R >= {FIRST_BUILD}), prefix:POSITION, "
            "prefix:FRACTION, decode:R, decode:R:from=POSITION or FRACTION, prefill:B or "
            "prefill:B:chunk=C (C a multiple of B)."
        )

    def first_query(self, length: int) -> int:
        """The first position that is answered in a sequence of this length."""
        if self.prefix is None:
            return 0
        return int(self.prefix * length) if isinstance(self.prefix, float) else self.prefix

    def context(self, length: int) -> int:
        """The positions that a share of the context is of: those before the first that is answered,
        or all of a sequence of this length where all are answered."""
        return self.first_query(length) or length

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

    def since(self, position: int, length: int) -> int:
        """From which position on distances are counted, for the query at this one."""
        if self.evict is not None:
            return min(self.first_query(length), position)
        return self.built_at(position, length)

    def evictions(self, position: int, length: int) -> int:
        """How many times keys have been dropped before the query at this position is answered, once
        evicting has begun."""
        assert self.evict is not None
        return (position - self.first_query(length)) // self.evict + 1

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
        if self.evict is not None:
            begins = "" if self.prefix == self.evict else f":from={self.prefix}"
            return f"decode:{self.evict}{begins}"
        return f"all:{self.rebuild}" if self.prefix is None else f"prefix:{self.prefix}"
