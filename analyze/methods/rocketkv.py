"""RocketKV: some keys evicted for good, the others found by page bounds on a few channels."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import POOL, ScoreMethod
from retrace.analyze.methods.toolkit import pages
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The keys that are left after the first stage, in order, and those since."""

    ids: Tensor
    """(left,) int64: position of each"""
    keys: Tensor
    """(left, channels)"""
    extremes: Tensor
    """(left, 2 channels): largest of each channel in the key's page, up to that key, and the
    least"""
    evicted: int
    """How many keys the first stage left out"""
    hidden: int
    """How many of these no query sees any more: a cache need not hold them"""


@dataclass(frozen=True, kw_only=True)
class RocketKV(ScoreMethod):
    """First keeps the share `prompt` of the keys, those that the last `window` queries attend to
    most; then ranks pages of the keys that are left by a bound on a few channels.

    Attention is summed over the window's queries and the group and smoothed by a maximum over
    `kernel` neighbours among the keys before the window. With a compression c in the second stage a
    page holds sqrt(c) keys and channels / sqrt(c) channels are read, those where the group's
    queries are largest. Of a channel a page offers one extreme, by the sign of the group's summed
    query: no bound for a head whose sign is another. Scores are tempered as SparQ's are, and heads
    agree by their mean softmax. Keys that come later join pages in order. The paper splits a whole
    compression between the stages by a rule of its own; here both are parameters, chosen so that a
    quarter is left.
    """

    source: ClassVar[str] = "arXiv:2502.14051 (RocketKV), section 3; NVlabs/RocketKV"
    fitted: ClassVar[bool] = True
    complete: ClassVar[bool] = False

    prompt: float = field(default=0.25, metadata={"help": "share of keys that is not evicted"})
    compression: int = field(default=16, metadata={"help": "of what the second stage reads"})
    window: int = field(default=32, metadata={"help": "queries at the end that are observed"})
    kernel: int = field(default=63, metadata={"help": "neighbours of the maximum; odd"})
    pool: str = field(default="sum-softmax", metadata=POOL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.prompt <= 1:
            raise RetraceError(f"prompt={self.prompt}: expected more than 0, up to 1.")

    @property
    def page(self) -> int:
        """Keys in a page."""
        return math.ceil(math.sqrt(self.compression))

    def build(self, past: Past) -> Any:
        """The keys that stay, by the attention of the window's queries."""
        judged = past.attention(slice(-self.window, None)).sum(dim=(0, 1))
        judged[-self.window :] = torch.inf
        before, reach = judged[None, : -self.window], self.kernel // 2
        if before.shape[-1]:
            before[:] = torch.nn.functional.max_pool1d(before, 2 * reach + 1, 1, padding=reach)
        judged[: past.hidden] = -1.0
        held = past.end - past.hidden
        count = max(min(self.window, past.end), math.ceil(self.prompt * held))
        left = judged.sort(descending=True, stable=True).indices[:count].sort().values
        return self._stored(left, past.keys[left], past.end - count, past.hidden)

    def extend(self, state: Stored, new: Past) -> Any:
        """None of the later keys is evicted."""
        ids = torch.arange(new.start, new.end, device=state.ids.device)
        return self._stored(
            torch.cat([state.ids, ids]),
            torch.cat([state.keys, new.keys]),
            state.evicted,
            state.hidden,
        )

    def scores(self, state: Stored, queries: Tensor, positions: Tensor) -> Tensor:
        """The page's score for each key that is left, -inf for the others."""
        end = int(positions[-1]) + 1
        held = end - state.evicted
        last = pages.last_keys(held, self.page, state.extremes.device)
        sparse = self._sparse(queries)
        up = sparse * (queries.sum(dim=0) >= 0)
        asked = torch.cat([up, sparse - up], dim=-1)
        bounds = asked @ state.extremes[last].T
        place = positions - state.evicted
        own = (asked * state.extremes[place]).sum(dim=-1)
        bounds = pages.with_own(bounds, own, place, self.page)
        of_keys = bounds.repeat_interleave(self.page, dim=-1)[..., :held]
        scores = of_keys.new_full((*of_keys.shape[:2], end), -torch.inf)
        scores[..., state.ids[:held]] = of_keys
        return scores

    def evicted(self, state: Stored, end: int) -> Tensor | None:
        """What the first stage left out."""
        gone = torch.ones(end, dtype=torch.bool, device=state.ids.device)
        return gone.index_fill_(0, state.ids[: end - state.evicted], False)

    def aux_bytes(self, state: Stored, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """One extreme of the channels read, for every page of the keys that are left. Where there
        is a window, as if it began the sequence."""
        left = (keys - max(0, state.evicted - state.hidden)).clamp(min=0)
        return torch.ceil(left / self.page) * self._channels(group.rules.key_dim) * group.itemsize

    def _channels(self, channels: int) -> int:
        return max(1, channels * self.page // self.compression)

    def _sparse(self, queries: Tensor) -> Tensor:
        """Queries with zeros for the channels that are not read, tempered by what these hold."""
        magnitude = queries.abs()
        count = min(self._channels(queries.shape[-1]), queries.shape[-1])
        chosen = magnitude.mean(dim=0).topk(count, dim=-1, sorted=False).indices
        mask = torch.zeros_like(queries[0]).scatter_(-1, chosen, 1.0)
        total = magnitude.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        covered = (magnitude * mask).sum(dim=-1, keepdim=True) / total
        return queries * mask * covered.clamp(min=1e-12).rsqrt()

    def _stored(self, ids: Tensor, keys: Tensor, evicted: int, hidden: int) -> Stored:
        low, high = pages.extremes(keys, self.page)
        extremes = torch.cat([high, low], dim=-1)
        return Stored(ids=ids, keys=keys, extremes=extremes, evicted=evicted, hidden=hidden)
