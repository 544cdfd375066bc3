"""H2O: the keys that all queries so far attended to."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import KEEP, POOL, EvictionMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.units.attention import first_visible
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class H2O(EvictionMethod):
    """Keeps the heavy hitters: the keys that received most attention from all queries so far.

    Half the budget goes to the past's last keys, as published (a tenth of the sequence each).
    Attention is summed, which favours early keys, since more queries saw them: `mean=true` divides
    by the number of those queries, as kvpress does (which keeps no recent keys). The published code
    decides anew with every token and forgets what it dropped, as under `decode:1`; elsewhere a past
    is judged once, at its end, by all its attention, and keys since are all attended besides the
    budget. Heads of a group share the mean, since they share a cache.
    """

    source: ClassVar[str] = "arXiv:2306.14048 (H2O), section 4; FMInference/H2O"

    mean: bool = field(default=False, metadata={"help": "divide by the queries that saw the key"})
    pool: str = field(default="mean", metadata=POOL)
    keep: Keep = field(default=Keep(recent_share=0.5), metadata=KEEP)

    @property
    def accumulates(self) -> bool:
        """Attention adds up; means of it are of the queries since the last judgement."""
        return not self.mean

    def importance(self, past: Past) -> Tensor:
        """Attention received (group, keys)."""
        received = past.attention_received()
        return received / _seen(past).clamp(min=1) if self.mean else received


def _seen(past: Past) -> Tensor:
    """How many queries of the past saw each key (keys,)."""
    positions = past.query_positions
    change = torch.zeros(len(past.keys) + 1, device=positions.device)
    ones = torch.ones_like(positions, dtype=change.dtype)
    change.index_add_(0, first_visible(positions, past.group.rules), ones)
    change.index_add_(0, positions + 1, -ones)
    return change[:-1].cumsum(dim=0)
