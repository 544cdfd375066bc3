"""Twilight: as few of a selector's keys as hold most of the mass."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.methods.base import BUDGET, ScoreMethod
from retrace.analyze.methods.low_bit import LowBit
from retrace.analyze.methods.options.budget import Budget
from retrace.analyze.methods.quest import Quest
from retrace.analyze.methods.toolkit.partial_attention import marked
from retrace.analyze.units.attention import first_visible
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class Twilight(ScoreMethod):
    """The fewest keys that hold a share of the estimated mass, out of the pages that Quest ranks
    first: estimated from keys in few bits, by each query head.

    The share is `budget=top-p:0.85` of the mass of the k best candidates, so that k is only a cap.
    Keys outside the candidates are never attended. The paper leaves the first two layers dense;
    results are per layer, so that either policy can be read off.
    """

    source: ClassVar[str] = "arXiv:2502.02770 (Twilight), section 4; tsinghua-ideal/Twilight"
    complete: ClassVar[bool] = False

    candidates: int = field(default=8192, metadata={"help": "keys in the pages looked at"})
    page: int = field(default=16, metadata={"help": "keys in a page"})
    bits: int = field(default=4, metadata={"help": "bits of a channel in the estimate"})
    budget: Budget = field(default=Budget("top-p", 0.85), metadata=BUDGET)

    def build(self, past: Past) -> Any:
        """What Quest and the estimate keep of each key, and the past."""
        return past, self._pages.build(past), self._estimate.build(past)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """The estimates of the candidates; -inf for other keys."""
        past, pages, estimate = state
        scores = self._estimate.scores(estimate, queries, positions)
        bounds = self._pages.scores(pages, queries, positions)
        count, end = max(1, self.candidates // self.page), scores.shape[-1]
        if count >= bounds.shape[-1]:
            return scores
        page = torch.arange(bounds.shape[-1], device=bounds.device)
        oldest = first_visible(positions, past.group.rules)[:, None] // self.page
        hidden = (page > positions[:, None] // self.page) | (page < oldest)
        chosen = top(bounds.masked_fill(hidden, -torch.inf), count)[1]
        taken = marked(chosen, len(page)).repeat_interleave(self.page, dim=-1)[..., :end]
        return scores.masked_fill(~taken, -torch.inf)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Quest's bounds, and the few bits of the candidates of every head of the group, or of all
        keys where that is less."""
        bounds = self._pages.aux_bytes(None, keys, group)
        looked_at = torch.minimum(keys, torch.full_like(keys, self.candidates * group.rules.group))
        return bounds + self._estimate.aux_bytes(None, looked_at, group)

    @property
    def _pages(self) -> Quest:
        return Quest(page=self.page)

    @property
    def _estimate(self) -> LowBit:
        return LowBit(bits=self.bits)
