"""Top-k and linear completion: what is not attended is estimated by linear attention."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.methods.base import AttendMethod, LearnedLike
from retrace.analyze.methods.toolkit.partial_attention import (
    attended_ids,
    marked,
    merged,
    part,
    visible_logits,
)
from retrace.analyze.methods.toolkit.training import descend, drawn_queries
from retrace.analyze.units.attention import softcap, visible
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules

RATE = 3e-2


@dataclass(frozen=True, kw_only=True)
class LinearCompletion(AttendMethod):
    """Sinks, recent keys and each head's exact k best of those between, and the rest of those
    between by feature maps: exp(q.k) as f(q).g(k), whose sums of g(k) v and g(k) are all that is
    read of them.

    Numerators and denominators add up before one normalisation, and what is attended exactly is
    taken out of the sums. A key joins them when it is no longer recent, where the paper sums once,
    at the end of the prompt. The maps are chosen here, exponentials of linear maps, and so are the
    numbers of sinks, recent keys and features; they are fitted to the attention, and to its sum,
    outside the best keys of queries.
    """

    source: ClassVar[str] = "arXiv:2604.05438 (top-k and fixed-size linear completion)"
    calibrated: ClassVar[bool] = True
    complete: ClassVar[bool] = True
    holds_keys: ClassVar[bool | None] = True

    features: int = field(default=32, metadata={"help": "features of a query and of a key"})
    sink: int = field(default=4, metadata={"help": "first keys, always exact", "least": 0})
    recent: int = field(default=32, metadata={"help": "last keys, always exact"})
    best: int = field(
        default=64, metadata={"help": "best keys left out in training, up to a tenth of the seen"}
    )
    steps: int = field(default=100, metadata={"help": "steps of training", "least": 0})
    batch: int = field(default=16, metadata={"help": "queries in a step"})
    seed: int = field(default=0, metadata={"help": "of the training", "least": 0})

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """The maps `query` (group, channels, features), `key` (channels, features) and, of each
        feature of a head, `offset` (group, 1, features)."""
        random = torch.Generator().manual_seed(self.seed)
        device, (heads, _, channels) = pasts[0].keys.device, pasts[0].queries.shape
        start = torch.randn(channels, self.features, generator=random) * (0.1 / channels**0.5)
        maps = {
            "query": start.expand(heads, -1, -1).clone(),
            "key": start,
            "offset": torch.zeros(heads, 1, self.features),
        }
        maps = {name: m.to(device).requires_grad_() for name, m in maps.items()}
        descent = torch.optim.Adam(maps.values(), lr=RATE)
        descend(descent, self.steps, lambda: self._loss(maps, pasts, random))
        return {name: m.detach() for name, m in maps.items()}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        sizes = {
            "query": (rules.group, rules.key_dim, self.features),
            "key": (rules.key_dim, self.features),
            "offset": (rules.group, 1, self.features),
        }
        return {name: (torch.float32, size) for name, size in sizes.items()}

    def _loss(
        self, maps: Mapping[str, Tensor], pasts: Sequence[Past], random: torch.Generator
    ) -> Tensor:
        """For `batch` queries of a sequence, both drawn: how far the estimates are from the
        attention outside the best keys (KL), and from the log of its sum."""
        which, rows = drawn_queries(pasts, self.batch, random)
        past = pasts[which]
        queries, positions = past.asked(rows)
        keys = torch.arange(past.end, device=positions.device)
        seen = visible(positions, keys, past.group.rules)
        logits = softcap(queries @ past.keys.T, past.group.rules).masked_fill(~seen, -torch.inf)
        most = (seen.sum(dim=-1) // 10).clamp(min=1, max=self.best)
        ranked = logits.sort(dim=-1, descending=True).values
        worst = ranked.gather(-1, (most - 1).expand(len(queries), -1)[..., None])
        rest = seen & (logits < worst)
        logits, known = logits.masked_fill(~rest, -torch.inf), rest.any(dim=-1, keepdim=True)
        estimates = _estimates(maps, queries, past.keys)
        exact, found = (
            z.masked_fill(~rest, -torch.inf).masked_fill(~known, 0.0).logsumexp(-1, keepdim=True)
            for z in (logits, estimates)
        )
        divergence = (torch.exp(logits - exact) * (found - estimates)).sum(dim=-1, keepdim=True)
        return ((divergence + (found - exact).square()) * known).mean()

    def build(self, past: Past) -> Any:
        """The past, with the maps."""
        return past

    def attend(
        self, state: Past, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Attention over exact and estimated keys, and the exact ones."""
        logits = visible_logits(state, queries, positions)
        keys = torch.arange(logits.shape[-1], device=logits.device)
        near = (keys < self.sink) | (keys > positions[:, None] - self.recent)
        between = logits.masked_fill(near, -torch.inf)
        rest = ~between.isneginf() & ~marked(top(between, min(k, len(keys)))[1], len(keys))
        attended = logits.masked_fill(rest, -torch.inf)
        estimates = _estimates(state.calibration, queries, state.keys[: len(keys)])
        values = state.values[: len(keys)]
        parts = [
            part(attended, values),
            part(estimates.masked_fill(~rest, -torch.inf), values),
        ]
        return merged(parts, state.unit.sinks), attended_ids(
            ~attended.isneginf(), logits, near, self.sink
        )

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """All keys, which are read to rank them, the sums, and each head's map of queries."""
        sums = self.features * (group.value_bytes + group.itemsize)
        maps = group.rules.group * self.features * (group.rules.key_dim + 1) * group.itemsize
        return keys * group.key_bytes + sums + maps


def _estimates(maps: Mapping[str, Tensor], queries: Tensor, keys: Tensor) -> Tensor:
    """log of f(q).g(k) (group, queries, keys) for queries (group, queries, channels) and keys
    (keys, channels)."""
    asked = queries @ maps["query"] + maps["offset"]
    held = keys @ maps["key"]
    # Their largest aside, so that no exponential overflows.
    high, wide = asked.amax(dim=-1, keepdim=True), held.amax(dim=-1, keepdim=True)
    products = torch.exp(asked - high) @ torch.exp(held - wide).T
    return products.clamp(min=torch.finfo(products.dtype).tiny).log() + high + wide.T
