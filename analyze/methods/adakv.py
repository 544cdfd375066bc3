"""Ada-KV: heads whose attention is spread keep more keys than those where it is concentrated."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import EvictionMethod
from retrace.analyze.methods.options.pooling import pool
from retrace.analyze.methods.snapkv import SnapKV
from retrace.analyze.units.past import Past
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """SnapKV whose heads share the budget of their layer, k keys a head on average: each keeps as
    many as it has among the best of all heads, with a floor.

    A head that has n of the layer's best is given `floor` k + (1 - `floor`) n, rounded, as in the
    authors' code; with `share=least`, as in kvpress, n is counted among what is left when every
    head has `floor` k, and all heads together keep k each exactly. Heads that share their keys are
    one. Importance and the window, which takes at most a share of the budget, are those of `snapkv`
    with its defaults, where the authors' scripts observe 32 queries and take the maximum of 7
    neighbours. Keys that come later are all attended.
    """

    source: ClassVar[str] = "arXiv:2407.11550 (Ada-KV), section 3; FFY0/AdaKV"

    floor: float = field(default=0.2, metadata={"help": "share of k that every head has"})
    share: str = field(
        default="blend",
        metadata={"help": "how the floor joins the rest", "choices": ("blend", "least")},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise RetraceError(f"floor={self.floor}: expected a share between 0 and 1.")

    def judge(self, past: Past) -> Any:
        """The importance of each key (group or 1, keys); for every kv head of the layer the places
        of its keys, ascending, among those of all (kv heads, group or 1, keys); which it is."""
        observed = past.layer_attention(self._observed).mean(dim=2)
        heads = self._smoothed(observed.flatten(0, 1)).view_as(observed)
        # The heads of a group agree, kv head by kv head.
        pooled = pool(self.pool, heads.transpose(0, 1)).transpose(0, 1)
        order = pooled.flatten().argsort(descending=True, stable=True)
        places = torch.empty_like(order)
        places.scatter_(0, order, torch.arange(len(order), device=order.device))
        own = past.group.kv_head
        return heads[own], places.view(pooled.shape).sort(dim=-1).values, own

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """The same for every query."""
        return EvictionMethod.scores(self, self.judged(state)[0], queries, positions)

    def allowance(self, state: Any, ks: Tensor) -> Tensor:
        """The head's part of k keys for each head of the layer."""
        _, places, own = self.judged(state)
        ks = ks.flatten()
        heads = places.flatten(0, 1)
        if self.share == "blend":
            among = _counts(heads, ks * len(heads))
            kept = (self.floor * ks + (1 - self.floor) * among.double()).round()
        else:
            kept = _at_least(heads, (self.floor * ks.double()).floor(), ks * len(heads))
        return kept.long().view(*places.shape[:2], -1)[own].movedim(-1, 0)[..., None]


def _counts(places: Tensor, best: Tensor) -> Tensor:
    """How many keys each head has among so many `best` (budgets,) of all: (heads, budgets)."""
    return torch.searchsorted(places, best.expand(len(places), -1).contiguous())


def _at_least(places: Tensor, least: Tensor, total: Tensor) -> Tensor:
    """Keys of each head (heads, budgets), `total` (budgets,) in all: those among the best of all
    heads, as many as there is room for when no head has fewer than `least` (budgets,)."""
    low, high = torch.zeros_like(total), torch.full_like(total, places.numel())
    while bool((low < high).any()):
        middle = (low + high) // 2
        enough = torch.maximum(_counts(places, middle), least).sum(dim=0) >= total
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return torch.maximum(_counts(places, low), least)
