"""Which queries of a sequence a trace keeps; keys and values are always kept whole."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from retrace.traces.errors import RetraceError

OBSERVED = 64
"""Queries at the end of a prompt that are kept in any case: methods that evict keys, SnapKV first,
judge the keys by what these attend to."""


@dataclass(frozen=True)
class QuerySelection:
    """The positions of a sequence whose queries are kept."""

    kind: Literal["all", "last", "stride"]
    amount: int = 1

    def positions(self, length: int, prompt: int | None = None) -> npt.NDArray[np.int32]:
        """Positions (queries,) that are kept of a sequence of `length` positions, ascending.

        Strides count back from the last position. The last `OBSERVED` of the prompt, which is the
        first `prompt` positions or the whole sequence, are always among those kept.

        >>> QuerySelection("stride", 4).positions(80)[:5].tolist()
        [3, 7, 11, 15, 16]
        """
        positions: npt.NDArray[np.int32] = np.arange(length, dtype=np.int32)
        if self.kind == "all":
            return positions
        end = length if prompt is None else prompt
        kept = (positions >= end - OBSERVED) & (positions < end)
        if self.kind == "last":
            kept |= positions >= length - self.amount
        else:
            kept |= (length - 1 - positions) % self.amount == 0
        return positions[kept]

    def candidates(self, start: int, end: int, prompt: int | None) -> npt.NDArray[np.int32]:
        """Of the positions from `start` up to `end`, those (queries,) that may be kept when the
        sequence, which has `end` positions now, has come to its end.

        Args:
            start: first position that is asked for.
            end: the last one, plus one.
            prompt: positions of the prompt, None while it may go on.

        >>> QuerySelection("last", 2).candidates(60, 200, 100)[[0, -3, -1]].tolist()
        [60, 99, 199]
        """
        positions: npt.NDArray[np.int32] = np.arange(start, end, dtype=np.int32)
        if self.kind != "last":
            return positions  # strides count back from an end that is not known
        kept = positions >= end - max(self.amount, OBSERVED if prompt is None else 0)
        if prompt is not None:
            kept |= (positions >= prompt - OBSERVED) & (positions < prompt)
        return positions[kept]

    def __str__(self) -> str:
        return self.kind if self.kind == "all" else f"{self.kind}:{self.amount}"


def parse_queries(text: str) -> QuerySelection:
    """`all`, `last:N` or `stride:N` as a selection; both keep the end of the prompt besides.

    >>> parse_queries("last:256")
    QuerySelection(kind='last', amount=256)
    """
    kind, colon, amount = text.partition(":")
    if text == "all":
        return QuerySelection("all")
    if kind in ("last", "stride") and colon and amount.isdecimal() and int(amount) >= 1:
        return QuerySelection("last" if kind == "last" else "stride", int(amount))
    raise RetraceError(
        f"queries must be 'all', 'last:N' (the last N of a sequence) or 'stride:N' (every N-th), "
        f"not {text!r}."
    )
