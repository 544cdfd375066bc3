"""SubBlock: blocks by the products of means of their quarters."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import BUDGET, BlockMethod
from retrace.analyze.methods.options.budget import Budget
from retrace.analyze.methods.toolkit.blocks import means
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class SubBlock(BlockMethod):
    """log of the sum of exp(mean query . mean key) over the quarters of a block of queries and of
    one of keys: what is left of attention mass when only quarters are averaged, not whole blocks.

    Published for blocks of 64 queries of an image model, in which queries see all keys; at a
    sparsity of 0.75.
    """

    source: ClassVar[str] = "sgl-project/sglang pull request 34148 (SubBlock)"

    parts: int = field(default=4, metadata={"help": "parts of a block, of queries and of keys"})
    budget: Budget = field(default=Budget("fraction", 0.25), metadata=BUDGET)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % self.parts:
            raise RetraceError(f"block={self.block}: expected a multiple of parts={self.parts}.")

    def build(self, past: Past) -> Tensor:
        """Means of the parts of all blocks of keys (parts, channels)."""
        return means(past.keys, self.block // self.parts)

    def block_scores(self, state: Tensor, queries: Tensor, positions: Tensor) -> Tensor:
        """log of the sum over pairs of parts."""
        rows, end = queries.shape[1], int(positions[-1]) + 1
        asked = means(queries, -(-rows // self.parts))
        parts = -(-end // (self.block // self.parts))
        products = asked @ state[:parts].T
        missing = (0, -parts % self.parts)
        products = torch.nn.functional.pad(products, missing, value=-torch.inf)
        pairs = products.view(*products.shape[:2], -1, self.parts).movedim(-1, 1)
        scores: Tensor = pairs.flatten(1, 2).logsumexp(dim=1)
        return scores

    def operations(self, queries: int, keys: int, group: HeadGroup) -> float:
        """A product for each pair of parts."""
        return float(self.parts * self.parts * keys / self.block * group.rules.key_dim)
