"""Keys in few bits: the simplest estimate of a score."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from retrace.analyze.methods.base import ScoreMethod
from retrace.analyze.methods.toolkit.quantisation import rounded
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class LowBit(ScoreMethod):
    """Scores keys by their product with the query when each key is held in `bits` bits a channel,
    with a scale and an offset of its own; the best are then attended in full.

    The estimate of Twilight's second stage, whose `budget=top-p:0.85` it takes.
    """

    source: ClassVar[str] = "arXiv:2502.02770 (Twilight), section 4.2"

    bits: int = field(default=4, metadata={"help": "bits of a channel"})

    def build(self, past: Past) -> Any:
        """The keys as their bits give them back."""
        return rounded(past.keys, self.bits)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """q.k of the rounded keys."""
        scores: Tensor = queries @ state[: int(positions[-1]) + 1].T
        return scores

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The bits of every key, its scale and its offset."""
        return keys * (group.rules.key_dim * self.bits / 8 + 2 * group.itemsize)
