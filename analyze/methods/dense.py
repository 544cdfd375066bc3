"""Attention over everything: what a method is measured against."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.output import merged, part, visible_logits
from retrace.analyze.past import Past
from retrace.analyze.top import top


@dataclass(frozen=True, kw_only=True)
class Dense(AttendMethod):
    """All visible keys, whatever the budget: the k best first, the others as they come.

    The error is rounding.
    """

    source: ClassVar[str] = "definition"
    complete: ClassVar[bool] = True

    def attend(
        self, state: Past, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Exact attention."""
        logits = visible_logits(state, queries, positions)
        output = merged([part(logits, state.values[: logits.shape[-1]])], state.unit.sinks)
        best = top(logits, min(k, logits.shape[-1]))[1]
        hidden = torch.nn.functional.pad(logits.isneginf(), (0, 1))
        hidden.scatter_(-1, torch.where(best < 0, logits.shape[-1], best), True)
        others = torch.arange(logits.shape[-1], device=best.device).expand(logits.shape)
        return output, torch.cat([best, others.masked_fill(hidden[..., :-1], -1)], dim=-1)
