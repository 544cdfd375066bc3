"""Keys at random: the floor that a method must beat."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from retrace.analyze.methods.base import ScoreMethod
from retrace.analyze.methods.toolkit.random_numbers import uniform
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class Random(ScoreMethod):
    """k visible keys, uniformly at random and anew for each query; recall is k / n on average."""

    source: ClassVar[str] = "definition"
    holds_keys: ClassVar[bool | None] = False

    seed: int = field(default=0, metadata={"help": "of the random numbers", "least": 0})

    def scores(self, state: Past, queries: Tensor, positions: Tensor) -> Tensor:
        """Uniform numbers, the same for a query whichever others it is answered with."""
        drawn = uniform(self.seed, state.group, positions, int(positions[-1]) + 1)
        return drawn[: len(queries)]
