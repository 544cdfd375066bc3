"""ArkVale: pages of keys by a ball around them."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze import pages
from retrace.analyze.methods.base import POOL, ScoreMethod
from retrace.analyze.past import Past
from retrace.analyze.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class ArkVale(ScoreMethod):
    """Pages of consecutive keys, ranked by a bound on the scores within the ball around the mean of
    their keys that holds them all: q.centre + ||q|| radius.

    The paper's other volume, a cuboid, is `quest`. The page of a new key is updated in place: a
    partial page has the ball of the keys it holds. That a page has 32 keys and that the group's
    bounds are summed is from memory of the paper.
    """

    source: ClassVar[str] = "ArkVale (NeurIPS 2024), section 4"

    page: int = field(default=32, metadata={"help": "keys in a page"})
    pool: str = field(default="sum", metadata=POOL)

    @property
    def unit_size(self) -> int:
        """A page."""
        return self.page

    def build(self, past: Past) -> Any:
        """Centre (keys, channels) and radius (keys,) of each key's page, up to that key."""
        split = pages.split(past.keys, self.page)
        counts = torch.arange(1, self.page + 1, device=split.device)
        centres = split.cumsum(dim=1) / counts[:, None]
        # Of each centre to each key of its page, of which those up to it count.
        distances = torch.cdist(centres, split, compute_mode="donot_use_mm_for_euclid_dist")
        radii = distances.tril().amax(dim=-1)
        return tuple(part.flatten(0, 1)[: len(past.keys)] for part in (centres, radii))

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """q.centre + ||q|| radius of every page (group, queries, pages)."""
        centres, radii = state
        last = pages.last_keys(int(positions[-1]) + 1, self.page, radii.device)
        norm = queries.norm(dim=-1, keepdim=True)
        bounds: Tensor = queries @ centres[last].T + norm * radii[last]
        own = (queries * centres[positions]).sum(dim=-1) + norm[..., 0] * radii[positions]
        return pages.with_own(bounds, own, positions, self.page)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """A centre and a radius per page."""
        return torch.ceil(keys / self.page) * (group.key_bytes + group.itemsize)
