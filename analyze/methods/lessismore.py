"""LessIsMore: one selection for all heads of a layer, reused by the layers above it."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from retrace.analyze.methods.base import KEEP, POOL
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.tidaldecode import TidalDecode
from retrace.analyze.units.attention import visible


@dataclass(frozen=True, kw_only=True)
class LessIsMore(TidalDecode):
    """The keys that stand first in any head of the nearest selecting layer below this one, the same
    for all heads, and a share of recent ones.

    Every head ranks the keys that are not kept anyway by its exact scores; a key has its best rank
    of all heads, and those of best rank fill the budget, of equal ones those of the first head, as
    the union of the heads' own best keys does in the code. A quarter is recent, rounded down, where
    the code rounds up. Layers select, and attend all keys, as in `tidaldecode`.
    """

    source: ClassVar[str] = "arXiv:2508.07101 (LessIsMore), section 3; DerrickYLJ/LessIsMore"

    pool: str = field(default="layer-max", metadata=POOL)
    keep: Keep = field(default=Keep(recent_share=0.25), metadata=KEEP)

    def at(self, k: int) -> Self:
        """With the keys that are kept under this budget, which are not ranked."""
        sink, recent = self.keep.at(k)
        return replace(self, keep=Keep(sink, recent))

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """Less the rank of each key among those that the query sees and does not keep, and less
        than 1 for the head's place in the layer."""
        scores = super().scores(state, queries, positions)
        keys, group = torch.arange(scores.shape[-1], device=scores.device), state.group
        ranked = visible(positions, keys, group.rules) & (keys >= self.keep.sink)
        ranked &= keys <= positions[:, None] - self.keep.recent
        order = scores.masked_fill(~ranked, -torch.inf).argsort(
            dim=-1, descending=True, stable=True
        )
        place = torch.arange(len(queries), device=keys.device) + group.heads.start
        ranks: Tensor = order.argsort(dim=-1) + place[:, None, None] / group.rules.heads
        return -ranks
