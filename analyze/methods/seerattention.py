"""SeerAttention: blocks by a learnt product of pooled queries and keys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import BlockMethod, LearnedLike
from retrace.analyze.methods.toolkit.blocks import means, split
from retrace.analyze.methods.toolkit.training import descend
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules

RATE = 3e-3


@dataclass(frozen=True, kw_only=True)
class SeerAttention(BlockMethod):
    """Mean queries of a block through a linear map, [maximum, minimum, mean] of keys through
    another, and their product: learnt to be the largest attention in each block.

    The maps are distilled from the trace: of some blocks of queries, the maxima of attention in
    blocks of keys, as shares, are what the softmax of the products is to be (Kullback-Leibler
    divergence). They begin as the product of means. The published gates see queries and keys before
    rotation and rotate what they make of them; here both are seen as attention does. Published for
    blocks of 64 queries, with a threshold of 5e-4 to 5e-3 on the softmax, or a number of blocks.
    """

    source: ClassVar[str] = "arXiv:2410.13276 (SeerAttention), section 3; microsoft/SeerAttention"

    steps: int = field(default=60, metadata={"help": "steps of training", "least": 0})
    batch: int = field(default=4, metadata={"help": "blocks of queries in a step"})
    seed: int = field(default=0, metadata={"help": "of the training", "least": 0})

    @property
    def calibrated(self) -> bool:
        """Always."""
        return True

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """Maps of queries, `query` (group, channels, channels), and of keys, `key`
        (3 * channels, channels)."""
        random = torch.Generator().manual_seed(self.seed)
        heads, _, channels = pasts[0].queries.shape
        same, none = torch.eye(channels), torch.zeros(2 * channels, channels)
        weights = {
            "query": same.expand(heads, -1, -1).clone().to(pasts[0].keys.device),
            "key": torch.cat([none, same]).to(pasts[0].keys.device),
        }
        descent = torch.optim.Adam([w.requires_grad_() for w in weights.values()], lr=RATE)
        pools = [_pooled(past.keys, self.block) for past in pasts]
        descend(descent, self.steps, lambda: self._loss(weights, pasts, pools, random))
        return {name: w.detach() for name, w in weights.items()}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        channels = rules.key_dim
        return {
            "query": (torch.float32, (rules.group, channels, channels)),
            "key": (torch.float32, (3 * channels, channels)),
        }

    def _loss(
        self,
        weights: Mapping[str, Tensor],
        pasts: Sequence[Past],
        pools: Sequence[Tensor],
        random: torch.Generator,
    ) -> Tensor:
        """For `batch` blocks of queries of a sequence, all drawn, of every head."""
        which = int(torch.randint(len(pasts), (), generator=random))
        past, size = pasts[which], self.block
        blocks = -(-len(past.query_positions) // size)
        total = past.keys.new_zeros(())
        for block in torch.randint(blocks, (self.batch,), generator=random).tolist():
            rows = slice(block * size, (block + 1) * size)
            queries = past.queries[:, rows]
            with torch.no_grad():
                attention = past.attention(rows)[..., : (block + 1) * size].amax(dim=1)
                target = split(attention[..., None], size).amax(dim=(-1, -2))
                target = target / target.sum(dim=-1, keepdim=True).clamp(min=1e-12)
            scores = _gate(weights, queries, pools[which][: block + 1])
            total = total - (target * scores.log_softmax(dim=-1)).sum() / len(queries)
        return total / self.batch

    def build(self, past: Past) -> Any:
        """The maps, and the pools of keys (blocks, 3 * channels)."""
        return past.calibration, _pooled(past.keys, self.block)

    def block_scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """The product of the mapped pools."""
        weights, pools = state
        return _gate(weights, queries, pools[: -(-(int(positions[-1]) + 1) // self.block)])

    def operations(self, queries: int, keys: int, group: HeadGroup) -> float:
        """One map of queries, and a product for each block of keys."""
        channels = group.rules.key_dim
        return float((channels + keys / self.block) * channels)

    def build_operations(self, queries: int, keys: int, group: HeadGroup) -> float:
        """The map of each pool of keys, once for the group."""
        return float(3 * group.rules.key_dim**2 * keys / self.block / group.rules.group)


def _pooled(keys: Tensor, size: int) -> Tensor:
    """Maximum, minimum and mean of each block of keys (blocks, 3 * channels)."""
    largest = split(keys, size, fill=-torch.inf).amax(dim=-2)
    least = split(keys, size, fill=torch.inf).amin(dim=-2)
    return torch.cat([largest, least, means(keys, size)], dim=-1)


def _gate(weights: Mapping[str, Tensor], queries: Tensor, pools: Tensor) -> Tensor:
    """Products (group, blocks) of a block of scaled queries (group, queries, channels) and pools of
    keys."""
    asked = (queries.mean(dim=1)[:, None] @ weights["query"])[:, 0]
    scores: Tensor = asked @ (pools @ weights["key"]).T
    return scores
