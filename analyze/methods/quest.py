"""Quest: an upper bound on the scores of a page of keys."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import ScoreMethod
from retrace.analyze.methods.toolkit import pages
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class Quest(ScoreMethod):
    """Pages of consecutive keys, ranked by a bound from each channel's extremes in the page.

    For each channel a page stores the least and the largest key value; the larger of their products
    with the query's channel, summed over channels, is at least the score of every key in the page.

    Follows the published accuracy code: pages are chosen for each query head, nothing is kept by
    force, at least `least_pages` are read, and the page of a new key is updated in place, so that a
    partial page has the bounds of the keys it holds. The CUDA path of the same code always keeps
    the newest page: `keep=recent:N`. The paper leaves the first two layers dense; results are per
    layer, so that either policy can be read off.
    """

    source: ClassVar[str] = "arXiv:2406.10774 (Quest), section 3.2; mit-han-lab/Quest"

    page: int = field(default=16, metadata={"help": "keys in a page"})
    least_pages: int = field(default=3, metadata={"help": "pages read however small the budget"})

    @property
    def unit_size(self) -> int:
        """A page."""
        return self.page

    def units(self, k: int) -> int:
        """As many whole pages as the budget holds, and no fewer than the least."""
        return max(self.least_pages, k // self.page)

    def build(self, past: Past) -> Any:
        """Least and largest value of each channel in each key's page, up to that key."""
        return pages.extremes(past.keys, self.page)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """sum_c max(q_c * low_c, q_c * high_c) for every page: (group, queries, pages)."""
        low, high = state
        last = pages.last_keys(int(positions[-1]) + 1, self.page, low.device)
        positive, negative = queries.clamp(min=0), queries.clamp(max=0)
        bounds: Tensor = positive @ high[last].T + negative @ low[last].T
        own = (positive * high[positions]).sum(-1) + (negative * low[positions]).sum(-1)
        return pages.with_own(bounds, own, positions, self.page)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Two vectors per page."""
        return 2 * torch.ceil(keys / self.page) * group.key_bytes
