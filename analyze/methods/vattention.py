"""vAttention: the best keys, and a random sample of the rest that is as large as it must be."""

from dataclasses import dataclass, field
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.partial_attention import (
    appended,
    attention,
    marked,
    visible_logits,
)
from retrace.analyze.methods.toolkit.random_numbers import uniform
from retrace.analyze.methods.toolkit.sampling import sampled_moments, smallest
from retrace.analyze.units.attention import unseen
from retrace.analyze.units.past import Past
from retrace.analyze.units.selection import missing_last


@dataclass(frozen=True, kw_only=True)
class VAttention(AttendMethod):
    """Sinks, recent keys and the k best exactly; of the n other keys as many drawn at random, each
    weighted by its chance, as keep the softmax's denominator within a share `epsilon` of its value
    with a probability of 1 - `delta`.

    How many that takes follows from the spread of exp(logit) in a first sample of a share `base` of
    them, by the normal distribution. Drawn without replacement from the true residual; the public
    code draws with replacement, from all keys between sinks and recent ones, the k best included.
    It also takes the quantile of one side (`one_sided=true`). The k best are exact, as in the
    paper's oracle; what is attended is more than k. Those drawn come last, in ascending position.
    """

    source: ClassVar[str] = "arXiv:2510.05688 (vAttention), section 4; xAlg-ai/sparse-attention-hub"
    holds_keys: ClassVar[bool | None] = True

    sink: int = field(default=128, metadata={"help": "first keys always attended", "least": 0})
    recent: int = field(default=128, metadata={"help": "last keys always attended", "least": 0})
    base: float = field(default=0.05, metadata={"help": "share of the rest in the first sample"})
    epsilon: float = field(default=0.05, metadata={"help": "relative error of the denominator"})
    delta: float = field(default=0.05, metadata={"help": "how often it may be larger"})
    one_sided: bool = field(default=False, metadata={"help": "bound errors in one direction"})
    seed: int = field(default=0, metadata={"help": "of the random numbers", "least": 0})

    def attend(
        self, state: Past, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Attention over what is kept and drawn, weighted, and those keys."""
        logits = visible_logits(state, queries, positions)
        found, sure, rest = self._split(state, logits, positions, k)
        size = rest.sum(dim=-1)
        drawn, count = self._drawn(state, logits, positions, sure, rest, size)
        chance = count.clamp(min=1) / size.clamp(min=1)
        logits -= torch.where(drawn, chance.log()[..., None], 0.0)
        logits.masked_fill_(rest ^ drawn, -torch.inf)
        output = attention(logits, state.values[: logits.shape[-1]], state.unit.sinks)
        return output, appended(found, drawn)

    def _split(
        self, past: Past, logits: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (group, queries, any) of the keys that are kept and then of the best of the others,
        -1 at the end; which keys those are, and which are the rest: bool, like logits."""
        count = logits.shape[-1]
        keys = torch.arange(count, device=logits.device)
        hidden = unseen(positions, keys, past.group.rules)
        kept = (keys < self.sink) | (keys > positions[:, None] - self.recent)
        best = top(torch.where(kept, -torch.inf, logits), min(k, count))[1]
        sure = marked(best, count) | (kept & ~hidden)
        first = self._kept(positions, hidden).expand(len(best), -1, -1)
        return missing_last(torch.cat([first, best], dim=-1)), sure, ~(sure | hidden)

    def _kept(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """Ids (queries, any) of the keys that are kept, sinks and then the newest first, -1 in
        place of those that are hidden, bool (queries, keys)."""
        count = hidden.shape[-1]
        sinks = torch.arange(min(self.sink, count), device=positions.device)
        back = torch.arange(min(self.recent, count), device=positions.device)
        recent = positions[:, None] - back
        ids = torch.cat([sinks.expand(len(positions), -1), recent], dim=-1)
        missing = hidden.gather(-1, ids.clamp(min=0))
        missing[:, len(sinks) :] |= recent < self.sink
        return ids.masked_fill(missing, -1)

    def _drawn(
        self,
        past: Past,
        logits: Tensor,
        positions: Tensor,
        sure: Tensor,
        rest: Tensor,
        size: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Which of the rest, `size` (group, queries) in all, are drawn (group, queries, keys), and
        how many that is (group, queries) int64."""
        draws = uniform(self.seed, past.group, positions, logits.shape[-1])
        draws = draws.masked_fill_(~rest, torch.inf)
        first = torch.ceil(self.base * size).clamp(min=2).minimum(size)
        sampled = smallest(draws, first)
        mean, squares, known = sampled_moments(logits, logits.amax(dim=-1), sampled, sure)
        variance = squares / (first - 1).clamp(min=1)
        total = known + size * mean
        beyond = self.delta if self.one_sided else self.delta / 2
        quantile = NormalDist().inv_cdf(1 - beyond)
        wanted = torch.ceil((quantile * size / (self.epsilon * total)).square() * variance)
        count = wanted.clamp(min=first, max=size).long()
        return smallest(draws, count), count
