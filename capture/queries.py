"""Which queries of a sequence a trace keeps; keys and values are always kept whole."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from retrace.traces import RetraceError


@dataclass(frozen=True)
class QuerySelection:
    """The positions of a sequence whose queries are kept."""

    kind: Literal["all", "last", "stride"]
    amount: int = 1

    def positions(self, length: int) -> npt.NDArray[np.int32]:
        """Positions (queries,) that are kept of a sequence of `length` positions, ascending.

        The last position is always among them: strides count back from it.

        >>> QuerySelection("stride", 4).positions(10).tolist()
        [1, 5, 9]
        """
        positions: npt.NDArray[np.int32] = np.arange(length, dtype=np.int32)
        if self.kind == "last":
            positions = positions[max(0, length - self.amount) :]
        if self.kind == "stride":
            positions = positions[(length - 1 - positions) % self.amount == 0]
        return positions


def parse_queries(text: str) -> QuerySelection:
    """`all`, `last:N` or `stride:N` as a selection.

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
