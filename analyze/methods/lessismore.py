"""LessIsMore: one selection for all heads of a layer, reused by the layers above it."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.methods.base import KEEP, POOL
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.tidaldecode import TidalDecode
from retrace.analyze.units.attention import unseen

BEST_OF = ("none", "max", "layer-max")
"""Poolings in which a key has its best rank of all heads."""


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
        within = replace(self, keep=Keep(sink, recent))
        alone = self.output != "mean-fill" and not self.budget.by_estimate
        if self.pool not in BEST_OF or not alone:
            return within
        parameters = {f.name: getattr(within, f.name) for f in fields(self)}
        return cast(Self, _BestOnly(**parameters, most=k))

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """Less the rank of each key among those that the query sees and does not keep, and less
        than 1 for the head's place in the layer."""
        scores = super().scores(state, queries, positions)
        keys, group = torch.arange(scores.shape[-1], device=scores.device), state.group
        unranked = unseen(positions, keys, group.rules) | (keys < self.keep.sink)
        unranked |= keys > positions[:, None] - self.keep.recent
        scores.masked_fill_(unranked, -torch.inf)
        place = torch.arange(len(queries), device=keys.device) + group.heads.start
        return self._less_ranks(scores, place[:, None, None] / group.rules.heads)

    def _less_ranks(self, scores: Tensor, place: Tensor) -> Tensor:
        """Less the rank of each key by scores (group, queries, keys), and less `place`
        (group, 1, 1)."""
        order = scores.argsort(dim=-1, descending=True, stable=True)
        return -(order.argsort(dim=-1) + place)


@dataclass(frozen=True, kw_only=True)
class _BestOnly(LessIsMore):
    """The same under one budget: a key that is not among the `most` first of any head is not among
    as many of best rank, and is never attended."""

    most: int

    def at(self, k: int) -> Self:
        return self

    def _less_ranks(self, scores: Tensor, place: Tensor) -> Tensor:
        ids = top(scores, min(self.most, scores.shape[-1]))[1]
        less = -(torch.arange(ids.shape[-1], device=ids.device) + place)
        ranks = less.expand(ids.shape).masked_fill(ids < 0, -torch.inf)
        missing = scores.shape[-1]
        found = scores.new_full((*scores.shape[:2], missing + 1), -torch.inf)
        return found.scatter_(-1, ids.masked_fill(ids < 0, missing), ranks)[..., :missing]
