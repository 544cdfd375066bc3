"""R-KV: the keys that the last queries attend to and that are like no other."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import POOL
from retrace.analyze.methods.snapkv import SnapKV
from retrace.analyze.units.attention import softcap, unseen
from retrace.analyze.units.past import Past
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class RKV(SnapKV):
    """Keeps the keys of largest `weight` times attention less (1 - `weight`) times redundancy, and
    those of the last `window` queries.

    Attention is that of these queries over all earlier keys, the largest score of a group's heads
    for each, smoothed by the maximum over `kernel` neighbours. A key is redundant as its direction
    is like that of others on average, of which the newest that is more than `similar` alike is left
    out, as in the authors' code; the softmax over keys makes both of one size. It is made for
    `decode:128` and a budget of 128. The window takes at most a share of the budget, as in
    `snapkv`.
    """

    source: ClassVar[str] = "arXiv:2505.24133 (R-KV), section 3; Zefan-Cai/R-KV"

    window: int = field(
        default=8, metadata={"help": "queries at the end that are observed", "least": 0}
    )
    kernel: int = field(default=7, metadata={"help": "neighbouring keys of which the most; odd"})
    weight: float = field(default=0.07, metadata={"help": "of attention; the rest is redundancy's"})
    similar: float = field(default=0.5, metadata={"help": "cosine from which on keys are alike"})
    pool: str = field(default="none", metadata=POOL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 1:
            raise RetraceError(f"weight={self.weight}: expected a share between 0 and 1.")

    def importance(self, past: Past) -> Tensor:
        """Importance (1, keys); above all of it the window's keys."""
        count = len(past.keys)
        before = count - min(self.window, count)
        queries, positions = past.asked(self._observed)
        scores = softcap(queries @ past.keys[:before].T, past.group.rules)
        keys = torch.arange(before, device=scores.device)
        scores = scores.masked_fill(unseen(positions, keys, past.group.rules), -torch.inf)
        attention = torch.softmax(scores.amax(dim=0), dim=-1).nan_to_num(0.0).mean(dim=0)
        if before:
            attention = torch.nn.functional.max_pool1d(
                attention[None], self.kernel, stride=1, padding=self.kernel // 2
            )[0]
        worth = self.weight * attention - (1 - self.weight) * self._redundancy(past.keys)[:before]
        newest_first = torch.arange(2.0, 2.0 + count - before, device=worth.device)
        return torch.cat([worth, newest_first])[None]

    def _redundancy(self, keys: Tensor) -> Tensor:
        """How alike each key (keys, channels) is to the others, a share of all (keys,)."""
        directions = torch.nn.functional.normalize(keys, dim=-1)
        alike = directions @ directions.T
        alike.fill_diagonal_(0.0)
        places = torch.arange(len(keys), device=keys.device)
        newest = torch.where(alike > self.similar, places, 0).amax(dim=-1)
        alike[places, newest] = 0.0
        return torch.softmax(alike.mean(dim=0), dim=-1)
