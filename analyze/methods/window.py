"""Attention sinks and the most recent keys (StreamingLLM)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import KEEP, ScoreMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class Window(ScoreMethod):
    """The first few keys and the most recent ones, k in all; no state and no search.

    The budget includes the sinks: 4 of them and the k - 4 newest keys.
    """

    source: ClassVar[str] = "arXiv:2309.17453 (StreamingLLM), section 3.2"

    holds_keys: ClassVar[bool | None] = False

    keep: Keep = field(default=Keep(sink=4, recent=1), metadata=KEEP)

    def build(self, past: Past) -> Any:
        """The position of each key."""
        return torch.arange(1.0, past.end + 1, device=past.keys.device)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """Newer keys score higher."""
        recency: Tensor = state[: int(positions[-1]) + 1]
        return recency.expand(*queries.shape[:2], -1)
