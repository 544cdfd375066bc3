"""vAttention: the best keys, and a random sample of the rest that is as large as it must be."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.partial_attention import (
    attended_ids,
    marked,
    merged,
    part,
    visible_logits,
)
from retrace.analyze.methods.toolkit.random_numbers import uniform
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class VAttention(AttendMethod):
    """Sinks, recent keys and the k best exactly; of the n other keys as many drawn at random, each
    weighted by its chance, as keep the softmax's denominator within a share `epsilon` of its value
    with a probability of 1 - `delta`.

    How many that takes follows from the spread of exp(logit) in a first sample of a share `base` of
    them, by the normal distribution. Drawn without replacement from the true residual; the public
    code draws with replacement, from all keys between sinks and recent ones, the k best included.
    It also takes the quantile of one side (`one_sided=true`). The k best are exact, as in the
    paper's oracle; what is attended is more than k.
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
        kept, best, rest = self._split(logits, positions, k)
        sure = kept | best
        place, size = self._order(state, rest, positions), rest.sum(dim=-1)
        drawn = rest & (place < self._sample_size(logits, sure, rest, place)[..., None])
        chance = drawn.sum(dim=-1).clamp(min=1) / size.clamp(min=1)
        attended = logits.masked_fill(~(sure | drawn), -torch.inf)
        weighted = torch.where(drawn, attended - chance.log()[..., None], attended)
        output = merged([part(weighted, state.values[: logits.shape[-1]])], state.unit.sinks)
        # After the k best those drawn, in the order of the draws.
        merit = torch.where(drawn, -1e30 * (1.0 + place), logits.masked_fill(~best, 0.0))
        return output, attended_ids(sure | drawn, merit, kept, self.sink)

    def _split(self, logits: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which keys are kept, which are the best of the others, and which are the rest: bool, like
        logits."""
        keys = torch.arange(logits.shape[-1], device=logits.device)
        seen = ~logits.isneginf()
        kept = seen & ((keys < self.sink) | (keys > positions[:, None] - self.recent))
        ids = top(logits.masked_fill(kept, -torch.inf), min(k, len(keys)))[1]
        best = marked(ids, len(keys))
        return kept, best, seen & ~kept & ~best

    def _order(self, past: Past, rest: Tensor, positions: Tensor) -> Tensor:
        """The place of each key of the rest in a random order, like rest."""
        draws = uniform(self.seed, past.group, positions, rest.shape[-1])
        draws = draws.masked_fill(~rest, torch.inf)
        return draws.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)

    def _sample_size(self, logits: Tensor, sure: Tensor, rest: Tensor, place: Tensor) -> Tensor:
        """How many of the rest are drawn (group, queries)."""
        size = rest.sum(dim=-1)
        first = torch.ceil(self.base * size).clamp(min=2).minimum(size)
        sampled = rest & (place < first[..., None])
        weights = torch.exp((logits - logits.amax(dim=-1, keepdim=True)).double())
        mean = (weights * sampled).sum(dim=-1) / first.clamp(min=1)
        squares = ((weights - mean[..., None]) * sampled).square().sum(dim=-1)
        variance = squares / (first - 1).clamp(min=1)
        total = (weights * sure).sum(dim=-1) + size * mean
        beyond = self.delta if self.one_sided else self.delta / 2
        quantile = torch.special.ndtri(torch.tensor(1 - beyond, dtype=torch.float64))
        wanted = torch.ceil((quantile * size / (self.epsilon * total)).square() * variance)
        return wanted.clamp(min=first, max=size)
