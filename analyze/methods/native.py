"""What a natively sparse model itself attends to: the choice of its own indexer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.dense import Dense
from retrace.analyze.methods.toolkit.partial_attention import attend_ids
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class Native(AttendMethod):
    """The keys that the model chose as it was captured, whatever the budget: its operating point is
    its `density`.

    Keys are in the indexer's own order where it hands one over, so recall at k is that of its k
    best. In layers that choose nothing it is full attention. Its index costs what the indexer keeps
    of each token, once for all heads of a layer, and nothing where a layer takes over the choice of
    an earlier one.
    """

    source: ClassVar[str] = (
        "the model; DeepSeek-V3.2 (arXiv:2512.02556), section 2.1, for the kind that most have"
    )
    holds_keys: ClassVar[bool | None] = False

    def build(self, past: Past) -> Past:
        """What holds the model's choice.

        Raises:
            RetraceError: the model makes none, in any layer.
        """
        if not past.natively_sparse:
            raise RetraceError(
                "is the choice of a natively sparse model, and this one attends to all that it "
                "sees: `dense` is that."
            )
        return past

    def attend(
        self, state: Past, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Attention over what was chosen, with the layer's sinks."""
        if state.group.rules.indexer is None:
            return Dense().attend(state, queries, positions, k)
        ids = state.chosen_at(positions).expand(len(queries), -1, -1)
        return attend_ids(state, queries, ids), ids

    def aux_bytes(self, state: Past, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """This kv head's share of the indexer's keys."""
        indexer = group.rules.indexer
        if indexer is None:
            return 0.0
        return keys.to(torch.float64) * indexer.bytes_per_key / group.rules.kv_heads
