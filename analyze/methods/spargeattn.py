"""SpargeAttn's choice of blocks: means of blocks that are alike in themselves."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import BUDGET, BlockMethod
from retrace.analyze.methods.options.budget import Budget
from retrace.analyze.methods.toolkit.blocks import means
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class SpargeAttn(BlockMethod):
    """Blocks of keys by the product of their mean with the mean query, where means say something:
    blocks whose vectors are unlike each other are always attended, and a block of queries that are
    attends all.

    A block is alike where the mean cosine of all its pairs is above 0.6. The fewest of those blocks
    whose softmax comes to 0.98 are attended; `similarity=-1,budget=fraction:0.5` is the rule that
    its authors' other function has by default. Their code stops before the block that crosses the
    share, attends no own block unless it is chosen, and on some GPUs compares keys less the
    prompt's mean. Its second stage, which skips products with values where the running maximum does
    not rise, and its quantisation are not part of the choice. Published for blocks of 128 queries.
    """

    source: ClassVar[str] = "arXiv:2502.18137 (SpargeAttn), section 3; thu-ml/SpargeAttn"

    similarity: float = field(
        default=0.6, metadata={"help": "mean cosine within a block, above which its mean counts"}
    )
    budget: Budget = field(default=Budget("top-p", 0.98), metadata=BUDGET)

    def build(self, past: Past) -> tuple[Tensor, Tensor]:
        """Mean of each block (blocks, channels), and whether its keys are alike (blocks,)."""
        return means(past.keys, self.block), self._alike(past.keys)

    def _alike(self, vectors: Tensor, size: int | None = None) -> Tensor:
        """Whether vectors (..., vectors, channels) of each block (..., blocks) are alike."""
        direction = torch.nn.functional.normalize(vectors, dim=-1)
        cosine = means(direction, size or self.block).square().sum(dim=-1)
        return cosine > self.similarity

    def block_scores(
        self, state: tuple[Tensor, Tensor], queries: Tensor, positions: Tensor
    ) -> Tensor:
        """Product of the means, where they count."""
        keys, alike = state
        units = -(-(int(positions[-1]) + 1) // self.block)
        scores = queries.mean(dim=1) @ keys[:units].T
        return scores.masked_fill(~alike[:units], -torch.inf)

    def always(self, state: tuple[Tensor, Tensor], queries: Tensor, positions: Tensor) -> Tensor:
        """Blocks that are not alike, or all."""
        units = -(-(int(positions[-1]) + 1) // self.block)
        return ~(state[1][:units] & self._alike(queries, queries.shape[1]))

    def operations(self, queries: int, keys: int, group: HeadGroup) -> float:
        """One product for each block of keys, and each pair of queries for their cosine."""
        return float((keys / self.block + queries * queries) * group.rules.key_dim)

    def build_operations(self, queries: int, keys: int, group: HeadGroup) -> float:
        """Each pair of keys of a block, once for the group."""
        return float(keys * self.block * group.rules.key_dim / group.rules.group)
