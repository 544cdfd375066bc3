"""Attention over everything: what a method is measured against."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.partial_attention import marked, merged, part, visible_logits
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class Dense(AttendMethod):
    """All visible keys, whatever the budget: the k best first, the others as they come.

    The error is rounding; with `cache` it is that of the cache alone.
    """

    source: ClassVar[str] = "definition"
    complete: ClassVar[bool] = True
    holds_keys: ClassVar[bool | None] = False
    plain: ClassVar[bool] = True

    def attend(
        self, state: Past, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Exact attention."""
        logits = visible_logits(state, queries, positions)
        output = merged([part(logits, state.values[: logits.shape[-1]])], state.unit.sinks)
        keys = logits.shape[-1]
        best = top(logits, min(k, keys))[1]
        others = torch.arange(keys, device=best.device).expand(logits.shape)
        listed = logits.isneginf() | marked(best, keys)
        return output, torch.cat([best, others.masked_fill(listed, -1)], dim=-1)
