"""KIVI: keys and values in few bits, keys by channel and values by token."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.quantisation import rounded_in_groups
from retrace.analyze.units.attention import log_normalizer, softcap, visible
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class KIVI(AttendMethod):
    """Keys rounded to few bits channel by channel, over `size` tokens each, and values token by
    token, over `size` channels each; the best k by those keys are attended, by those values.

    A budget of all keys is the published method, which attends every token; smaller ones say what
    ranking by the rounded keys is worth. The newest tokens are held in full, as the published code
    decodes: keys until there are `residual` to round together, values until they are more than
    `residual` tokens back. So every query has its own state, and none is rebuilt.
    """

    source: ClassVar[str] = "arXiv:2402.02750 (KIVI), section 3 and algorithm 1; jy-yuan/KIVI"

    bits: int = field(default=2, metadata={"help": "bits of an element"})
    size: int = field(default=32, metadata={"help": "elements that share a scale and an offset"})
    residual: int = field(
        default=128, metadata={"help": "newest tokens in full; a multiple of size"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual % self.size:
            raise RetraceError(f"residual={self.residual}: expected a multiple of {self.size}.")

    def build(self, past: Past) -> Any:
        """The past, and its rounded keys and values. Keys that do not fill a group yet stay."""
        whole = len(past.keys) // self.size * self.size
        keys = rounded_in_groups(past.keys[:whole].T, self.bits, self.size).T
        values = rounded_in_groups(past.values, self.bits, self.size)
        return past, torch.cat([keys, past.keys[whole:]]), values

    def attend(
        self, state: Any, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Attention over the best k, each token in few bits or in full as the query finds it."""
        past, keys, values = state
        rules, end = past.group.rules, int(positions[-1]) + 1
        logits = softcap(queries @ keys[:end].T, rules)
        # Before this none is held in full.
        first = int(positions[0]) // self.residual * self.residual
        every = torch.arange(end, device=positions.device)
        full = every[first:] >= (positions - positions % self.residual)[:, None]
        exact = softcap(queries @ past.keys[first:end].T, rules)
        logits[..., first:] = torch.where(full, exact, logits[..., first:])
        best, ids = top(logits.masked_fill_(~visible(positions, every, rules), -torch.inf), k)
        weights = torch.exp(best - log_normalizer(best, past.unit.sinks)[..., None])
        newest = positions[:, None] - ids <= self.residual
        places = ids.clamp(min=0)
        output = torch.zeros((), device=logits.device)
        for some, own in ((newest, past.values), (~newest, values)):
            placed = logits.zero_().scatter_add_(-1, places, weights.masked_fill(~some, 0.0))
            output = output + placed @ own[:end]
        return output, ids

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """All keys, and the values that are held in full, whichever are attended: the newest tokens
        are read as they are. Where there is a window, as if it began the sequence."""
        full = (keys - 1) % self.residual + 1
        channels = group.rules.key_dim
        few = self._bytes(channels, channels / self.size, group)
        newest = keys.clamp(max=self.residual + 1)
        read: Tensor = (keys - full) * few + full * group.key_bytes + newest * group.value_bytes
        return read

    def attended_bytes(self, group: HeadGroup) -> float:
        """The value in few bits, since the key is read to rank it."""
        channels = group.rules.value_dim
        return self._bytes(channels, -(-channels // self.size), group)

    def _bytes(self, channels: int, scales: float, group: HeadGroup) -> float:
        """Of so many rounded channels of a token, with as many scales and offsets."""
        return channels * self.bits / 8 + 2 * scales * group.itemsize
