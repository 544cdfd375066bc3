"""LessIsMore: one selection for all heads of a layer, reused by the layers above it."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.attention import visible
from retrace.analyze.keep import Keep
from retrace.analyze.methods.base import KEEP, POOL
from retrace.analyze.methods.tidaldecode import TidalDecode


@dataclass(frozen=True, kw_only=True)
class LessIsMore(TidalDecode):
    """The keys that stand first in any head of the nearest selecting layer at or below this one,
    the same for all heads, and a share of recent ones.

    Every head ranks keys by its exact scores; a key has its best rank of all heads, and those of
    best rank fill the budget, as a union of the heads' own best keys does. The recent quarter is
    from memory. Layers select as in `tidaldecode`.
    """

    source: ClassVar[str] = "arXiv:2508.07101 (LessIsMore), section 3"

    pool: str = field(default="layer-max", metadata=POOL)
    keep: Keep = field(default=Keep(recent_share=0.25), metadata=KEEP)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """Less the rank of each key among those that the query sees."""
        scores = super().scores(state, queries, positions)
        keys = torch.arange(scores.shape[-1], device=scores.device)
        hidden = ~visible(positions, keys, state.group.rules)
        order = scores.masked_fill(hidden, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        return -order.argsort(dim=-1).to(scores.dtype)
