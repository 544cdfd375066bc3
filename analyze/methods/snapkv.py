"""SnapKV: the keys that the end of the prompt attends to."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import POOL, EvictionMethod
from retrace.analyze.past import Past


@dataclass(frozen=True, kw_only=True)
class SnapKV(EvictionMethod):
    """Keeps the keys that the last `window` queries attend to most, and the keys of that window.

    Attention is averaged over the window's queries and, along the sequence, over `kernel`
    neighbours. The heads of a group share the mean, as in kvpress; the paper's models have no
    groups. Of a budget smaller than the window its newest keys are kept.
    """

    source: ClassVar[str] = "arXiv:2404.14469 (SnapKV), section 4; NVIDIA/kvpress"

    window: int = field(default=64, metadata={"help": "queries at the end that are observed"})
    kernel: int = field(default=5, metadata={"help": "neighbouring keys averaged; odd"})
    pool: str = field(default="mean", metadata=POOL)

    def importance(self, past: Past) -> Tensor:
        """Smoothed mean attention (group, keys); above all of it the window's keys."""
        attention = past.attention(slice(-self.window, None)).mean(dim=1)
        reach = self.kernel // 2
        smoothed = torch.nn.functional.avg_pool1d(
            torch.nn.functional.pad(attention, (reach, reach)), 2 * reach + 1, stride=1
        )
        window = min(self.window, len(past.keys))
        newest_first = 2.0 + torch.arange(window, device=attention.device)
        before = smoothed[:, : len(past.keys) - window]
        return torch.cat([before, newest_first.expand(len(before), -1)], dim=-1)
