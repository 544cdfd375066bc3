"""How the keys that a method attends move from query to query: counts, and what is read off them.

The counts are over consecutive queries of one sequence, of which the first fills an empty buffer
and is not counted itself. They are whole numbers, so any order of adding gives the same bytes.
`docs/locality.md` has the definitions in full.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Doubles = NDArray[np.float64]

SPANS = tuple(1 << i for i in range(9))
"""Queries that working sets are over: 1, 2, 4, ... 256."""
SIZES = tuple(1 << i for i in range(25))
"""Keys that a buffer holds: 1, 2, 4, ... more than any context has."""

QUERIES, ATTENDED, WRITTEN, FIRST, REPEATED, RETURNED = range(6)
"""Places of the counts of queries and of the keys that these attend: of all keys, of those that
were just written, that are read for the first time, that the query before read too, and that were
read longer ago."""
DISTANCES = slice(6, 6 + len(SIZES))
"""Keys that the buffer of each size holds, and the one of half that size does not."""
WORKING = slice(DISTANCES.stop, DISTANCES.stop + len(SPANS))
"""Distinct keys of all spans of queries of each length together."""
WINDOWS = slice(WORKING.stop, WORKING.stop + len(SPANS))
"""How many such spans there are."""
SHARED = WINDOWS.stop
"""Keys that two heads of a group attend, pair by pair."""
FIELDS = SHARED + 1


class Figure(NamedTuple):
    """What is told of a cache that follows the queries of a sequence."""

    title: str
    definition: str
    at: str = ""
    """What its column `at` counts; nothing where that is 0."""
    most: float = np.inf


FIGURES = {
    "repeated": Figure(
        "Repeated", "share of the keys attended that the query before attended too", most=1.0
    ),
    "returned": Figure(
        "Returned",
        "share of the keys attended that an earlier query attended, and the one before did not",
        most=1.0,
    ),
    "first_read": Figure(
        "First read", "share of the keys attended that no counted query attended before", most=1.0
    ),
    "just_written": Figure(
        "Just written", "share of the keys attended that are the query's own position", most=1.0
    ),
    "working_set": Figure(
        "Working set", "distinct keys that so many consecutive queries attend", "queries"
    ),
    "hit_rate": Figure(
        "Hit rate",
        "share of the keys attended, those just written left aside, that are among the keys "
        "touched last, as many as the buffer holds",
        "keys in the buffer",
        1.0,
    ),
    "misses": Figure(
        "Misses", "keys attended by a query that the buffer does not hold", "keys in the buffer"
    ),
    "link_bytes": Figure(
        "Link bytes",
        "bytes of these keys and values, in the format that the method reads",
        "keys in the buffer",
    ),
    "distinct": Figure(
        "Distinct",
        "distinct keys that the heads of a group attend, over the sum of what each attends",
        most=1.0,
    ),
    "overlap": Figure(
        "Overlap",
        "share of the keys that a head attends which another head of its group attends too, on "
        "average over the others",
        most=1.0,
    ),
}
"""By name. Shares and rates are those of sums over queries."""


@dataclass(frozen=True)
class Locality:
    """What was counted of one method in some kv heads: for each query head of a group, and last for
    the group as one, where it has several heads."""

    counts: Counts
    """(topk, kv_heads, caches, FIELDS)"""
    missed_bytes: Doubles
    """Bytes of the keys and values that a buffer of each size lacks (topk, kv_heads, caches,
    SIZES)."""

    @classmethod
    def empty(cls, budgets: int, kv_heads: int, group: int) -> Self:
        """Nothing counted."""
        shape = (budgets, kv_heads, caches_of(group))
        return cls(np.zeros((*shape, FIELDS), np.int64), np.zeros((*shape, len(SIZES))))

    @classmethod
    def checked(cls, like: Self, counts: Counts, missed_bytes: Doubles) -> Self:
        """The same of arrays that anybody may have written.

        Raises:
            ValueError: they are no counts of that shape, or of keys that cannot be.
        """
        for array, known in ((counts, like.counts), (missed_bytes, like.missed_bytes)):
            if array.dtype != known.dtype or array.shape != known.shape:
                raise ValueError("They are no counts of locality.")
        kinds = counts[..., [WRITTEN, FIRST, REPEATED, RETURNED]].sum(axis=-1)
        held = counts[..., DISTANCES].sum(axis=-1)
        right = (counts >= 0).all() and (kinds == counts[..., ATTENDED]).all()
        right &= (held <= counts[..., ATTENDED] - counts[..., WRITTEN]).all()
        if not right or not (np.isfinite(missed_bytes) & (missed_bytes >= 0)).all():
            raise ValueError("They are counts of locality that cannot be.")
        return cls(counts, missed_bytes)

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """Several kv heads side by side."""
        return cls(
            np.concatenate([part.counts for part in parts], axis=1),
            np.concatenate([part.missed_bytes for part in parts], axis=1),
        )

    def merge(self, other: Self) -> Self:
        """With another sequence's queries."""
        return type(self)(self.counts + other.counts, self.missed_bytes + other.missed_bytes)


def caches_of(group: int) -> int:
    """How many caches a group has: one for each head, and one of all of them."""
    return group + 1 if group > 1 else 1


def misses(counts: Counts) -> Counts:
    """Keys (..., SIZES) that a buffer of each size lacks, those just written left aside."""
    looked_up = counts[..., ATTENDED] - counts[..., WRITTEN]
    missed: Counts = looked_up[..., None] - counts[..., DISTANCES].cumsum(axis=-1)
    return missed
