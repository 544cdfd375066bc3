"""Blocks at random: the floor that a method of prefill must beat."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from retrace.analyze.methods.base import BlockMethod
from retrace.analyze.methods.toolkit.random_numbers import uniform
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(BlockMethod):
    """Blocks of keys uniformly at random, anew for each block of queries, besides its own."""

    source: ClassVar[str] = "definition"

    seed: int = field(default=0, metadata={"help": "of the random numbers", "least": 0})

    def block_scores(self, state: Past, queries: Tensor, positions: Tensor) -> Tensor:
        """Uniform numbers, the same for a block of queries whenever it is asked for."""
        units = -(-(int(positions[-1]) + 1) // self.block)
        return uniform(self.seed, state.group, positions[:1], units)[:, 0]
