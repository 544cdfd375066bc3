"""ArkVale: pages of keys by the box around their centre."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import KEEP, POOL, ScoreMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.toolkit import pages
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class ArkVale(ScoreMethod):
    """Pages of consecutive keys, ranked by the largest score within a box: around the middle of
    each channel's extremes, as wide as the keys are from it on average (the paper's cuboid mean).

    The group's scores are summed. One page of sinks and a window of two are kept, which take at
    most a quarter and half of the budget, so that the published sizes hold from k = 128 on. They
    are counted in keys here, where the code's window ends with the page that is being filled and
    holds 33 to 64. The page of a new key is updated in place: a partial page has the box of the
    keys it holds.
    """

    source: ClassVar[str] = "ArkVale (NeurIPS 2024), section 5.2; pku-liang/ArkVale"

    page: int = field(default=32, metadata={"help": "keys in a page"})
    pool: str = field(default="sum", metadata=POOL)
    keep: Keep = field(
        default=Keep(sink=32, sink_most=0.25, recent=64, recent_most=0.5), metadata=KEEP
    )

    @property
    def unit_size(self) -> int:
        """A page."""
        return self.page

    def build(self, past: Past) -> Any:
        """Least and largest value of each channel in the box of each key's page, up to that key:
        both (keys, channels)."""
        split = pages.split(past.keys, self.page)
        centres = (split.cummin(dim=1).values + split.cummax(dim=1).values) / 2
        # Of each centre to the keys of its page so far.
        reach = torch.stack(
            [
                (split[:, :count] - centres[:, count - 1 : count]).abs().mean(dim=1)
                for count in range(1, self.page + 1)
            ],
            dim=1,
        )
        box = centres - reach, centres + reach
        return tuple(part.flatten(0, 1)[: len(past.keys)] for part in box)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """sum_c max(q_c * low_c, q_c * high_c) for every page: (group, queries, pages)."""
        low, high = state
        last = pages.last_keys(int(positions[-1]) + 1, self.page, low.device)
        positive, negative = queries.clamp(min=0), queries.clamp(max=0)
        most: Tensor = positive @ high[last].T + negative @ low[last].T
        own = (positive * high[positions]).sum(-1) + (negative * low[positions]).sum(-1)
        return pages.with_own(most, own, positions, self.page)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Two vectors per page."""
        return 2 * torch.ceil(keys / self.page) * group.key_bytes
