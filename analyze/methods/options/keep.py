"""Keys that are attended whatever their score: attention sinks and recent keys."""

import re
from dataclasses import dataclass
from typing import Self

import numpy as np

from retrace.traces import RetraceError

_NUMBER = r"\d{0,9}\.?\d{1,9}"  # of nine digits at most: there are no more positions
_PART = re.compile(rf"(sink|recent):({_NUMBER})([kr]?)(?:<({_NUMBER})k)?")


@dataclass(frozen=True)
class Keep:
    """The first `sink` positions and the `recent` last ones, the query's own included.

    Written `sink:4+recent:64`. `recent:0.25k` is a share of the budget k, so that the kept set
    differs from budget to budget (as in SparQ Attention, where a quarter is local), and
    `recent:0.5r` a share of what the sinks leave of it. `sink:32<0.25k` are 32 sinks, and at most
    a quarter of the budget: what is published for large budgets leaves something to find in small
    ones too. `prompt` is all before the first eviction under the protocol `decode:R:from=P`,
    besides the budget.
    """

    sink: int = 0
    recent: int = 0
    recent_share: float = 0.0
    of_rest: bool = False
    """Whether that is a share of what the sinks leave, rather than of the budget."""
    sink_most: float | None = None
    """Most of the budget that sinks take."""
    recent_most: float | None = None
    """Most of the budget that `recent` keys take."""
    prompt: bool = False
    """Whether all that comes before the first eviction is kept, besides the budget."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `sink:4+recent:64`; `none` or nothing keeps none."""
        found: dict[str, int | float | bool] = {}
        for part in text.split("+") if text not in ("", "none") else ():
            if part.strip() == "prompt":
                found["prompt"] = True
                continue
            match = _PART.fullmatch(part.strip())
            if match is None or (match[3] and (match[1] == "sink" or match[4])):
                raise RetraceError(
                    f"keep={text!r}: expected sink:N, recent:N or recent:0.25k, joined by '+'; "
                    "sink:N<0.25k is at most that share of the budget, prompt all before decoding."
                )
            name, number, share, most = match.groups()
            if share:
                found |= {"recent_share": float(number), "of_rest": share == "r"}
            elif "." in number:
                raise RetraceError(f"keep={text!r}: {number} is not a whole number of keys.")
            else:
                found[name] = int(number)
            if most:
                found[f"{name}_most"] = float(most)
        return cls(**found)  # type: ignore[arg-type]

    def at(self, k: int) -> tuple[int, int]:
        """How many sinks and recent keys are kept under a budget of k keys."""
        sink = _at_most(self.sink, self.sink_most, k)
        share = _share(self.recent_share, k - sink if self.of_rest else k)
        return sink, max(_at_most(self.recent, self.recent_most, k), share)

    @property
    def grows(self) -> bool:
        """Whether the recent keys that are kept differ from budget to budget."""
        return self.recent_share > 0 or self.recent_most is not None

    def __str__(self) -> str:
        parts = ["prompt"] if self.prompt else []
        parts += [f"sink:{self.sink}{_most(self.sink_most)}"] if self.sink else []
        if self.recent:
            parts.append(f"recent:{self.recent}{_most(self.recent_most)}")
        if self.recent_share:
            parts.append(f"recent:{_shortest(self.recent_share)}{'r' if self.of_rest else 'k'}")
        return "+".join(parts) or "none"


def _share(share: float, k: int) -> int:
    # Rounded first: 0.29 of 100 keys are 29, though the product is a little less.
    return int(round(share * k, 6))


def _at_most(count: int, most: float | None, k: int) -> int:
    return count if most is None else min(count, _share(most, k))


def _most(share: float | None) -> str:
    return "" if share is None else f"<{_shortest(share)}k"


def _shortest(number: float) -> str:
    return np.format_float_positional(number, trim="-")
