"""Random eviction: the floor that a method which evicts must beat."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from retrace.analyze.methods.base import EvictionMethod
from retrace.analyze.methods.toolkit.random_numbers import uniform
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class RandomEviction(EvictionMethod):
    """Keeps keys at random, drawn anew at each eviction, the same for the heads of a group.

    With `keep=prompt` under `decode:R:from=P` the prompt stays and what is generated is dropped at
    random, which arXiv:2609.03430 says matches the strongest evictors.
    """

    source: ClassVar[str] = "definition; arXiv:2609.03430 (Random Attention), abstract"

    seed: int = field(default=0, metadata={"help": "of the random numbers", "least": 0})

    def importance(self, past: Past) -> Tensor:
        """Uniform numbers (1, keys)."""
        now = past.in_sequence(past.query_positions.new_tensor([past.end - 1]))
        return uniform(self.seed, past.group, now, len(past.keys), heads=1)[:, 0]
