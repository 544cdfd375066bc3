"""SnapKV: the keys that the end of the prompt attends to."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from retrace.analyze.methods.base import POOL, EvictionMethod
from retrace.analyze.units.past import Past
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class Observed:
    """A past, and what it was judged to be worth by windows of some sizes."""

    past: Past
    by_window: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SnapKV(EvictionMethod):
    """Keeps the keys that the last `window` queries attend to most, and the keys of that window.

    Attention is averaged over the window's queries and, along the keys before the window, over
    `kernel` neighbours. The heads of a group share the mean, as in kvpress; the paper's models have
    no groups. The authors' code refuses a budget that the window fills: here the window takes at
    most the share `window_share` of the budget, so that the published 64 hold from k = 256 on, and
    below k = 4 the last query is observed and its key kept only if it is among the best.
    """

    source: ClassVar[str] = "arXiv:2404.14469 (SnapKV), section 4; FasterDecoding/SnapKV"

    window: int = field(
        default=64, metadata={"help": "queries at the end that are observed", "least": 0}
    )
    window_share: float = field(
        default=0.25, metadata={"help": "most of the budget that the window's keys take"}
    )
    kernel: int = field(default=5, metadata={"help": "neighbouring keys averaged; odd"})
    pool: str = field(default="mean", metadata=POOL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.window_share < 1:
            raise RetraceError(
                f"window_share={self.window_share}: expected more than 0 and less than 1, or "
                "nothing is left to find."
            )

    def at(self, k: int) -> Self:
        """With a window that leaves most of the budget to what it finds."""
        return replace(self, window=min(self.window, int(round(self.window_share * k, 6))))

    def build(self, past: Past) -> Any:
        """The past: what is observed of it depends on the budget."""
        return Observed(past=past)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """The same for every query."""
        return super().scores(self.judged(state), queries, positions)

    def judged(self, state: Observed) -> Any:
        """What `judge` says of the past; worked out once for each size of the window."""
        if self.window not in state.by_window:
            state.by_window[self.window] = self.judge(state.past)
        return state.by_window[self.window]

    def judge(self, past: Past) -> Any:
        """The importance of each key (group or 1, keys)."""
        return super().build(past)

    def importance(self, past: Past) -> Tensor:
        """Smoothed mean attention (group, keys); above all of it the window's keys."""
        return self._smoothed(past.attention(self._observed).mean(dim=1))

    @property
    def _observed(self) -> slice:
        """The last queries, that are observed."""
        return slice(-max(1, self.window), None)

    def _smoothed(self, observed: Tensor) -> Tensor:
        """Attention (heads, keys) smoothed along the keys before the window; above it the window's
        own keys, the newest first."""
        count, reach = observed.shape[-1], self.kernel // 2
        window = min(self.window, count)
        before = observed[:, : count - window]
        if before.shape[-1]:
            padded = torch.nn.functional.pad(before, (reach, reach))
            before = torch.nn.functional.avg_pool1d(padded, 2 * reach + 1, stride=1)
        newest_first = torch.arange(2.0, 2.0 + window, device=before.device)
        return torch.cat([before, newest_first.expand(len(before), -1)], dim=-1)
