"""The block oracle: the blocks of keys that hold the most attention."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from retrace.analyze.methods.base import BlockMethod
from retrace.analyze.methods.toolkit.blocks import logs, sums
from retrace.analyze.methods.toolkit.partial_attention import visible_logits
from retrace.analyze.units.attention import log_normalizer
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class BlockOracle(BlockMethod):
    """The blocks with the largest exact attention mass of a block of queries: no choice of as many
    whole blocks holds more.

    Its own blocks are attended too, as by all methods here, so that others are compared at the same
    number of pairs; `keep=none` leaves that to the mass. With `block=1` it bounds every choice that
    queries of a block share.
    """

    source: ClassVar[str] = "definition"

    def block_scores(self, state: Past, queries: Tensor, positions: Tensor) -> Tensor:
        """log of the exact mass on each block."""
        logits = visible_logits(state, queries, positions)
        log_total = log_normalizer(logits, state.unit.sinks)[..., None]
        return logs(sums((logits - log_total).exp().sum(dim=1), self.block))

    def operations(self, queries: int, keys: int, group: HeadGroup) -> float:
        """All scores."""
        return float(queries * keys * group.rules.key_dim)
