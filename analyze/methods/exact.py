"""Exact attention over the k keys of largest score: what every other method is measured by."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from retrace.analyze.methods.base import ScoreMethod
from retrace.analyze.units.attention import softcap
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class Exact(ScoreMethod):
    """The k keys of largest exact score, ties to the lower position.

    Keeps the most attention mass that k keys can hold; the least output error is another matter.
    With `pool` set, the best selection that a group can share under that rule;
    `budget=top-p:0.95` is the fewest keys that hold a share of the mass of the k best, and
    `budget=threshold:T` keeps what is within T of the largest logit, as range queries
    (AlayaDB, arXiv:2504.10326) and skipped blocks (BLASST, arXiv:2512.12087) do.
    """

    source: ClassVar[str] = "definition"
    holds_keys: ClassVar[bool | None] = True

    def scores(self, state: Past, queries: Tensor, positions: Tensor) -> Tensor:
        """softcap(scale * q.k) as the layer defines it."""
        keys = state.keys[: int(positions[-1]) + 1]
        return softcap(queries @ keys.T, state.group.rules)
