"""Keys at random: the floor that a method must beat."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import HeadGroup, ScoreMethod


@dataclass(frozen=True, kw_only=True)
class Random(ScoreMethod):
    """k visible keys, uniformly at random and anew for each query; recall is k / n on average."""

    source: ClassVar[str] = "definition"

    seed: int = field(default=0, metadata={"help": "of the random numbers", "least": 0})

    def build(self, keys: Tensor, values: Tensor, group: HeadGroup) -> Any:
        """What the random numbers of a query follow from besides its position."""
        return (self.seed, group.layer, group.sequence, group.kv_head)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """Uniform numbers, the same for a query whichever others it is answered with."""
        scores = torch.zeros(len(queries), len(positions), int(positions[-1]) + 1)
        generator = torch.Generator()
        for row, position in enumerate(positions.tolist()):
            generator.manual_seed(hash((*state, position)))
            scores[:, row, : position + 1] = torch.rand(
                len(queries), position + 1, generator=generator
            )
        return scores.to(queries.device)
