"""SeerAttention-R: pages by a learnt product of a group's queries and pooled keys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import LearnedLike, ScoreMethod
from retrace.analyze.methods.toolkit import pages
from retrace.analyze.methods.toolkit.training import descend, drawn_queries
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules

RATE = 3e-3


@dataclass(frozen=True, kw_only=True)
class SeerAttentionR(ScoreMethod):
    """All queries of a group through one linear map, [maximum, minimum, mean] of a page's keys
    through another, and their product: one score of a page for all heads of the group.

    The maps are distilled from the trace: of some queries, the largest attention of any head in
    each page, as shares, is what the softmax of the products is to be (Kullback-Leibler
    divergence). They begin as the product of means. The published gate has 128 channels, sees
    queries and keys before rotation and rotates what it makes of them; here it has as many as a key
    and sees both as attention does. The page that a query is in comes first, as published, for
    budgets of 4,096 keys.
    """

    source: ClassVar[str] = "arXiv:2506.08889 (SeerAttention-R), section 3; microsoft/SeerAttention"
    calibrated: ClassVar[bool] = True

    page: int = field(default=64, metadata={"help": "keys in a page"})
    steps: int = field(default=60, metadata={"help": "steps of training", "least": 0})
    batch: int = field(default=16, metadata={"help": "queries in a step"})
    seed: int = field(default=0, metadata={"help": "of the training", "least": 0})

    @property
    def unit_size(self) -> int:
        """A page."""
        return self.page

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """Maps of all queries of the group, `query` (group * channels, channels), and of keys,
        `key` (3 * channels, channels)."""
        random = torch.Generator().manual_seed(self.seed)
        heads, _, channels = pasts[0].queries.shape
        same, none = torch.eye(channels), torch.zeros(2 * channels, channels)
        weights = {
            "query": same.repeat(heads, 1) / heads,
            "key": torch.cat([none, same]),
        }
        weights = {name: w.to(pasts[0].keys.device).requires_grad_() for name, w in weights.items()}
        descent = torch.optim.Adam(weights.values(), lr=RATE)
        pools = [_pooled(past.keys, self.page) for past in pasts]
        descend(descent, self.steps, lambda: self._loss(weights, pasts, pools, random))
        return {name: w.detach() for name, w in weights.items()}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        channels = rules.key_dim
        return {
            "query": (torch.float32, (rules.group * channels, channels)),
            "key": (torch.float32, (3 * channels, channels)),
        }

    def _loss(
        self,
        weights: Mapping[str, Tensor],
        pasts: Sequence[Past],
        pools: Sequence[Tensor],
        random: torch.Generator,
    ) -> Tensor:
        """For `batch` queries of a sequence, all drawn."""
        which, rows = drawn_queries(pasts, self.batch, random)
        past, positions = pasts[which], pasts[which].query_positions[rows]
        with torch.no_grad():
            attention = past.attention(rows).amax(dim=0)
            largest = pages.split(attention.T, self.page).amax(dim=1).T
            target = largest / largest.sum(dim=-1, keepdim=True)
        gates = pools[which] @ weights["key"]
        scores = _gate(weights, past.queries[:, rows], gates, positions, self.page)
        unseen = _unseen(scores, positions, self.page)
        logs = scores.masked_fill(unseen, -torch.inf).log_softmax(dim=-1)
        return -(target * logs.masked_fill(unseen, 0.0)).sum(dim=-1).mean()

    def build(self, past: Past) -> Any:
        """The maps, and what the map makes of each key's page, up to that key (keys, channels)."""
        return past.calibration, _pooled(past.keys, self.page) @ past.calibration["key"]

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """The same for all heads of the group, and most of all for the page that a query is in."""
        weights, gates = state
        scores = _gate(weights, queries, gates[: int(positions[-1]) + 1], positions, self.page)
        pages_seen = scores.masked_fill(_unseen(scores, positions, self.page), -torch.inf)
        largest = pages_seen.amax(dim=-1)
        scores = pages.with_own(scores[None], largest[None] + 1, positions, self.page)
        return scores.expand(len(queries), -1, -1)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """A mapped vector per page, and the map that queries meet."""
        weights = group.rules.group * group.rules.key_dim * group.key_bytes
        return torch.ceil(keys / self.page) * group.key_bytes + weights


def _pooled(keys: Tensor, size: int) -> Tensor:
    """Maximum, minimum and mean of each key's page, up to that key (keys, 3 * channels)."""
    low, high = pages.extremes(keys, size)
    return torch.cat([high, low, pages.means(keys, size)], dim=-1)


def _gate(
    weights: Mapping[str, Tensor], queries: Tensor, gates: Tensor, positions: Tensor, size: int
) -> Tensor:
    """Products (queries, pages) of scaled queries (group, queries, channels) at positions, mapped
    together, and the pages' vectors `gates` (keys, channels)."""
    asked = queries.movedim(0, 1).flatten(1) @ weights["query"]
    scores = asked @ gates[pages.last_keys(len(gates), size, gates.device)].T
    own = (asked * gates[positions]).sum(dim=-1)
    return pages.with_own(scores[None], own[None], positions, size)[0]


def _unseen(scores: Tensor, positions: Tensor, size: int) -> Tensor:
    """Which pages begin after the query, bool like scores (queries, pages)."""
    return torch.arange(scores.shape[-1], device=scores.device) * size > positions[:, None]
