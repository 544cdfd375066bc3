"""Pages by their mean key, as MoBA and the compressed branch of NSA see them."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import ScoreMethod
from retrace.analyze.methods.toolkit import pages
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class MeanPage(ScoreMethod):
    """Pages of consecutive keys, ranked by the query's product with the mean of their keys.

    MoBA's gate (mean pooling, no parameters) on a model that was not trained with it; there a block
    has 512 keys and the current one is always read (`keep=recent:N`), here a page has 64, the block
    that NSA selects. The page of a new key is updated in place: a partial page has the mean of the
    keys it holds.
    """

    source: ClassVar[str] = "arXiv:2502.13189 (MoBA), section 2.2; arXiv:2502.11089 (NSA)"

    page: int = field(default=64, metadata={"help": "keys in a page"})

    @property
    def unit_size(self) -> int:
        """A page."""
        return self.page

    def build(self, past: Past) -> Any:
        """Mean of the keys in each key's page, up to that key (keys, channels)."""
        return pages.means(past.keys, self.page)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """q.mean(K) of every page (group, queries, pages)."""
        last = pages.last_keys(int(positions[-1]) + 1, self.page, state.device)
        scores: Tensor = queries @ state[last].T
        own = (queries * state[positions]).sum(dim=-1)
        return pages.with_own(scores, own, positions, self.page)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """A vector per page."""
        return torch.ceil(keys / self.page) * group.key_bytes
