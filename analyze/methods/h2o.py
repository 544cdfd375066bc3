"""H2O: the keys that all queries so far attended to."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import KEEP, POOL, EvictionMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.units.attention import visible
from retrace.analyze.units.past import Past

ROWS = 256
"""Queries whose attention is held at once."""


@dataclass(frozen=True, kw_only=True)
class H2O(EvictionMethod):
    """Keeps the heavy hitters: the keys that received most attention from all queries so far.

    Half the budget goes to the past's last keys, as published (a tenth of the sequence each).
    Attention is summed, which favours early keys, since more queries saw them: `mean=true` divides
    by the number of those queries, as kvpress does (which keeps no recent keys). The published code
    decides anew with every token and forgets what it dropped; here a past is judged once, at its
    end, by all its attention, and keys since are all attended besides the budget. Heads of a group
    share the mean, since they share a cache.
    """

    source: ClassVar[str] = "arXiv:2306.14048 (H2O), section 4; FMInference/H2O"

    mean: bool = field(default=False, metadata={"help": "divide by the queries that saw the key"})
    pool: str = field(default="mean", metadata=POOL)
    keep: Keep = field(default=Keep(recent_share=0.5), metadata=KEEP)

    def importance(self, past: Past) -> Tensor:
        """Attention received (group, keys)."""
        total = past.keys.new_zeros(len(past.queries), len(past.keys))
        seen = past.keys.new_zeros(len(past.keys))
        keys = torch.arange(past.start, past.end, device=past.keys.device)
        for start in range(0, len(past.query_positions), ROWS):
            rows = slice(start, start + ROWS)
            total += past.attention(rows).sum(dim=1)
            seen += visible(past.query_positions[rows], keys, past.group.rules).sum(dim=0)
        return total / seen.clamp(min=1) if self.mean else total
