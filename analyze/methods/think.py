"""ThinK: keys without the channels that matter least."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.partial_attention import (
    attention,
    best_only,
    visible_logits,
)
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class ThinK(AttendMethod):
    """Keys lose the channels of least E[q^2] E[k^2], over the last queries and all keys of the
    past; the best k by what is left of their logits are attended, by those logits.

    A budget of all keys is the published method, which prunes channels and not tokens; smaller ones
    say what ranking by the channels left is worth. Pruned keys are read to find the best and not
    again. The newest `recent` keys of the past and those that come later keep all channels.
    Heads of a group share channels by the mean of their E[q^2], as in kvpress; the authors' code
    holds keys for each head. Their code's own default is a ratio of 0.4, the paper also has 0.5.
    """

    source: ClassVar[str] = "arXiv:2407.21018 (ThinK), section 3; SalesforceAIResearch/ThinK"
    fitted: ClassVar[bool] = True

    ratio: float = field(default=0.5, metadata={"help": "share of channels pruned"})
    window: int = field(default=32, metadata={"help": "queries at the end that are observed"})
    recent: int = field(
        default=32, metadata={"help": "newest keys that keep all channels", "least": 0}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio < 1:
            raise RetraceError(f"ratio={self.ratio}: expected 0 or more, and less than 1.")

    def build(self, past: Past) -> Any:
        """The past; its keys with zeros in place of what is pruned (keys, channels); how many of
        them are pruned."""
        if not past.queries.shape[1]:
            raise RetraceError(f"needs queries before position {past.end}; the trace has none.")
        squares = past.queries[:, -self.window :].square().mean(dim=(0, 1))
        weight = squares * past.keys.square().mean(dim=0)
        ascending = weight.sort(stable=True).indices
        count = max(0, len(past.keys) - self.recent)
        keys = past.keys.clone()
        keys[:count, ascending[: self._pruned(len(weight))]] = 0
        return past, keys, count

    def extend(self, state: Any, new: Past) -> Any:
        """New keys keep all channels."""
        _, keys, count = state
        return new.whole, torch.cat([keys, new.keys]), count

    def attend(
        self, state: Any, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Attention over the best k, by logits of the channels left."""
        past, keys, _ = state
        logits, ids = best_only(visible_logits(past, queries, positions, keys), k)
        return attention(logits, past.values[: logits.shape[-1]], past.unit.sinks), ids

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """All keys, with the channels that each has left, and which those are, in a bit each. Where
        there is a window, as if it began the sequence."""
        channels = group.rules.key_dim
        pruned = keys.clamp(max=state[2]) * self._pruned(channels)
        which = channels / 8 if self._pruned(channels) else 0
        read: Tensor = (keys * channels - pruned) * group.itemsize + which
        return read

    def attended_bytes(self, group: HeadGroup) -> float:
        """The value, since the key is read to rank it."""
        return group.value_bytes

    def _pruned(self, channels: int) -> int:
        return int(channels * self.ratio)
