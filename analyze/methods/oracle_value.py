"""The keys whose values move the output most: what minding the values is worth."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import ScoreMethod
from retrace.analyze.methods.toolkit.partial_attention import merged, part, visible_logits
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class OracleValue(ScoreMethod):
    """The k keys of largest p |v - o|: exact probability times how far the value is from the
    output.

    Leaving key i out and renormalising moves the output by p / (1 - p) (o - v). With
    `distance=norm` the value's own norm is taken, which needs no output. It is charged as exact
    attention is: reading all values to rank them is the oracle's privilege.
    """

    source: ClassVar[str] = "arXiv:2512.07647 (output error of a selection)"
    holds_keys: ClassVar[bool | None] = True

    distance: str = field(
        default="output",
        metadata={
            "help": "of the value: from the output, or its norm",
            "choices": ("output", "norm"),
        },
    )

    def scores(self, state: Past, queries: Tensor, positions: Tensor) -> Tensor:
        """logit + log |v - o|, which ranks as p |v - o| does."""
        logits = visible_logits(state, queries, positions)
        values = state.values[: logits.shape[-1]]
        squared = values.square().sum(dim=-1)
        if self.distance == "output":
            output = merged([part(logits, values)], state.unit.sinks)
            squared = squared - 2 * output @ values.T + output.square().sum(dim=-1, keepdim=True)
        # Never quite zero, so that a full budget attends every key.
        return logits + 0.5 * torch.log(squared.clamp(min=1e-30))
