"""Mixture of block attention: a query's own block, and the others by their mean key."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.mean_page import MeanPage


@dataclass(frozen=True, kw_only=True)
class MoBA(MeanPage):
    """Blocks of consecutive keys, ranked by the query's product with the mean of their keys: the
    query's own block first, as one of those that the budget buys.

    `mean-page` with larger blocks, whose own block has no score. It is replayed on models that were
    not trained with it. Published are 3 blocks of 512 keys, k = 1,536, and for Llama-3.1-8B 12 of
    4,096. A budget of less than two blocks reads the query's own.
    """

    source: ClassVar[str] = "arXiv:2502.13189 (MoBA), section 2.2; MoonshotAI/MoBA"

    page: int = field(default=512, metadata={"help": "keys in a block"})

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """q.mean(K) of every block, and more than any earlier one for the query's own (group,
        queries, blocks)."""
        scores = super().scores(state, queries, positions)
        blocks = torch.arange(scores.shape[-1], device=scores.device)
        own = (positions // self.page)[:, None]
        best = scores.masked_fill(blocks >= own, -torch.inf).amax(dim=-1, keepdim=True)
        # So much more that sums over heads keep the order.
        more = (best + 0.01 * (1 + best.abs())).masked_fill(best.isneginf(), -torch.inf)
        return torch.where(blocks == own, torch.maximum(scores, more), scores)
