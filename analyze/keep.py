"""Keys that a method attends whatever their score: attention sinks and recent keys."""

import re
from dataclasses import dataclass
from typing import Self

import numpy as np

from retrace.traces import RetraceError

_PART = re.compile(r"(sink|recent):(\d*\.?\d+)(k?)")


@dataclass(frozen=True)
class Keep:
    """The first `sink` positions and the `recent` last ones, the query's own included.

    Written `sink:4+recent:64`. `recent:0.25k` is a share of the budget k, so that the kept set
    differs from budget to budget (as in SparQ Attention, where a quarter is local).
    """

    sink: int = 0
    recent: int = 0
    recent_share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `sink:4+recent:64`; `none` or nothing keeps none."""
        found = {"sink": 0, "recent": 0, "recent_share": 0.0}
        for part in text.split("+") if text not in ("", "none") else ():
            match = _PART.fullmatch(part.strip())
            if match is None or (match[1] == "sink" and match[3]):
                raise RetraceError(
                    f"keep={text!r}: expected sink:N, recent:N or recent:0.25k, joined by '+'."
                )
            name, number, share = match.groups()
            if share:
                found["recent_share"] = float(number)
            elif "." in number:
                raise RetraceError(f"keep={text!r}: {number} is not a whole number of keys.")
            else:
                found[name] = int(number)
        return cls(**found)  # type: ignore[arg-type]

    def at(self, k: int) -> tuple[int, int]:
        """How many sinks and recent keys are kept under a budget of k keys."""
        # Rounded first: 0.29 of 100 keys are 29, though the product is a little less.
        return self.sink, max(self.recent, int(round(self.recent_share * k, 6)))

    def __str__(self) -> str:
        parts = [f"sink:{self.sink}"] if self.sink else []
        if self.recent:
            parts.append(f"recent:{self.recent}")
        if self.recent_share:
            parts.append(f"recent:{np.format_float_positional(self.recent_share, trim='-')}k")
        return "+".join(parts) or "none"
