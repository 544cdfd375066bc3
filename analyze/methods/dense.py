"""Attention over everything: what a method is measured against."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.output import merged, part, visible_logits
from retrace.analyze.past import Past


@dataclass(frozen=True, kw_only=True)
class Dense(AttendMethod):
    """All visible keys, best first, whatever the budget; the error is rounding."""

    source: ClassVar[str] = "definition"
    complete: ClassVar[bool] = True

    def attend(
        self, state: Past, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Exact attention."""
        logits = visible_logits(state, queries, positions)
        best, ids = logits.sort(dim=-1, descending=True, stable=True)
        values = state.values[: logits.shape[-1]]
        output = merged([part(logits, values)], state.unit.sinks)
        return output, ids.masked_fill(best.isneginf(), -1)
