"""What the kernels read: queries, keys and values in the trace's dtype, and who sees whom."""

from dataclasses import dataclass

import torch
from torch import Tensor

from retrace.analyze.units.attention import first_visible
from retrace.analyze.units.unit import Block


@dataclass(frozen=True)
class Inputs:
    """Queries of the heads of one kv head, and the keys they see. All tensors are contiguous."""

    queries: Tensor
    """(group, queries, channels)"""
    keys: Tensor
    """(keys, channels)"""
    values: Tensor
    """(keys, value channels)"""
    positions: Tensor
    """The last key that each query sees (queries,) int32, ascending."""
    first: Tensor
    """The first key that each query sees (queries,) int32, ascending."""
    scale: float
    """Greater than 0, so that products rank keys as scores do."""
    softcap: float | None
    sinks: Tensor | None
    """(group,) float32"""

    @classmethod
    def of(cls, block: Block) -> "Inputs":
        """A block's, in the dtype of the trace, in which they are exact."""
        unit, rules = block.unit, block.unit.group.rules
        return cls(
            block.queries.to(unit.dtype).contiguous(),
            unit.narrow_keys[: block.end],
            unit.narrow_values[: block.end],
            block.positions.to(torch.int32),
            first_visible(block.positions, rules).to(torch.int32),
            rules.scale,
            rules.softcap,
            None if unit.sinks is None else unit.sinks.float().contiguous(),
        )

    @property
    def rows(self) -> int:
        """Queries of all heads."""
        return self.queries.shape[0] * self.queries.shape[1]

    def scores(self, products: Tensor) -> Tensor:
        """Scores of products (any) of queries with keys; -inf stays."""
        scores = products * self.scale
        if self.softcap is None:
            return scores
        capped = torch.tanh(scores / self.softcap) * self.softcap
        return capped.masked_fill(products == -torch.inf, -torch.inf)

    def products(self) -> Tensor:
        """q.k (group, queries, keys) float32, -inf where a key is not visible: for the plain twins.

        Scores are a growing function of them, so that keys are ranked by the products.
        """
        products = self.queries.float() @ self.keys.float().T
        keys = torch.arange(len(self.keys), device=self.keys.device)
        seen = (keys <= self.positions[:, None]) & (keys >= self.first[:, None])
        return products.masked_fill(~seen, -torch.inf)
