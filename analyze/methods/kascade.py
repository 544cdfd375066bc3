"""Kascade: anchor layers select, and each head above them reuses the head most like it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import POOL
from retrace.analyze.methods.tidaldecode import TidalDecode
from retrace.analyze.past import Past
from retrace.analyze.top import top
from retrace.traces import RetraceError

OBSERVED = 64
"""Queries at the end of each sequence that heads are compared by."""


@dataclass(frozen=True, kw_only=True)
class Kascade(TidalDecode):
    """The exact best keys of a kv head of the nearest anchor layer at or below this one: of the
    head whose keys hold most of this head's attention.

    Heads of a group agree by the sum of their softmax. Which kv head stands for which is learnt:
    the mass that this head puts on the best `share` of the other's keys over the mass on its own
    best, on average over queries. Anchors are those published for Llama-3.1-8B; the paper finds
    them by dynamic programming over the least such ratio, weighted by how much a layer changes the
    residual stream, which a trace does not hold.
    """

    source: ClassVar[str] = "arXiv:2512.16391 (Kascade), section 3"
    calibrated: ClassVar[bool] = True

    select: int = field(default=0, metadata={"help": "the first anchor layer", "least": 0})
    correct: int = field(default=2, metadata={"help": "the second anchor layer", "least": 0})
    anchors: str = field(default="8+13+14", metadata={"help": "further ones, joined by +"})
    share: float = field(default=0.1, metadata={"help": "of the keys, by which heads are compared"})
    pool: str = field(default="sum-softmax", metadata=POOL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(part.isdecimal() for part in self.anchors.split("+")):
            raise RetraceError(f"anchors={self.anchors!r}: expected layers joined by +, as 8+13.")

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """The kv head of the anchor layer that stands for this one (1,)."""
        anchor = self._selecting(pasts[0].group.layer)
        if anchor == pasts[0].group.layer or anchor not in pasts[0].layers:
            return {"head": torch.tensor([pasts[0].group.kv_head])}
        likeness = torch.stack([self._likeness(past, past.layer(anchor)) for past in pasts])
        return {"head": likeness.mean(dim=0).argmax(dim=0, keepdim=True)}

    def _head(self, past: Past, heads: Sequence[Past]) -> Past:
        return heads[int(past.calibration["head"])]

    def _selecting(self, layer: int) -> int:
        every = (self.select, self.correct, *map(int, self.anchors.split("+")))
        return max((anchor for anchor in every if anchor <= layer), default=layer)

    def _likeness(self, past: Past, heads: Sequence[Past]) -> Tensor:
        """Of the mass on its own best keys, how much this head puts on those of each other
        (heads,)."""
        own = self._pooled(past)
        count = max(1, int(self.share * past.end))
        most = top(own, count)[0].sum(dim=-1)
        found = []
        for head in heads:
            ids = top(self._pooled(head), count)[1]
            mass = own.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0).sum(dim=-1)
            found.append((mass / most).mean())
        return torch.stack(found)

    @staticmethod
    def _pooled(past: Past) -> Any:
        """Attention of the last queries, summed over the group (queries, keys)."""
        return past.attention(slice(-OBSERVED, None)).sum(dim=0)
