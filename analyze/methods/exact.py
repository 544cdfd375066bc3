"""Exact attention over the k keys of largest score: what every other method is measured by."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retrace.analyze.attention import score
from retrace.analyze.methods.base import HeadGroup, ScoreMethod


@dataclass(frozen=True, kw_only=True)
class Exact(ScoreMethod):
    """The k keys of largest exact score, ties to the lower position.

    Keeps the most attention mass that k keys can hold; the least output error is another matter.
    With `pool` set, the best selection that a whole group can share under that rule.
    """

    source: ClassVar[str] = "definition"
    holds_keys: ClassVar[bool] = True

    def build(self, keys: Tensor, values: Tensor, group: HeadGroup) -> Any:
        """The keys themselves."""
        return keys, group.rules

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """softcap(scale * q.k) as the layer defines it."""
        keys, rules = state
        return score(queries, keys[: int(positions[-1]) + 1], rules)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """All keys, which are read to rank them."""
        return keys * group.key_bytes
