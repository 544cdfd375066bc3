"""Squeezed Attention: clusters whose share of attention passes a threshold that heads share."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.kmeans import kmeans, totals
from retrace.analyze.methods.toolkit.partial_attention import (
    attended_ids,
    merged,
    part,
    visible_logits,
)
from retrace.analyze.units.attention import softcap, visible
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """The clusters of a past's keys."""

    past: Past
    """With later keys, which are not clustered."""
    centroids: Tensor
    """(clusters, channels): mean key"""
    labels: Tensor
    """(clustered,): the cluster of each clustered key"""
    first: int
    """The first key that is clustered."""

    def shares(self, queries: Tensor, positions: Tensor) -> Tensor:
        """The estimated share of attention of each clustered key (group, queries, clustered), for
        scaled queries (group, queries, channels): exp(q.c) of its centroid c over the sum of that
        for all that the query sees; 0 where it does not see the key."""
        rules = self.past.group.rules
        keys = self.first + torch.arange(len(self.labels), device=positions.device)
        estimates = softcap(queries @ self.centroids.T, rules)[..., self.labels]
        estimates = estimates.masked_fill(~visible(positions, keys, rules), -torch.inf)
        return estimates.softmax(dim=-1).nan_to_num(0.0)


@dataclass(frozen=True, kw_only=True)
class Squeezed(AttendMethod):
    """Attends the clusters whose keys' estimated share of attention is above a threshold, the same
    for all heads, so that heads and queries with flat attention attend more keys.

    The threshold for a budget k is a quantile of the mean shares over the last `observed` queries:
    k keys a head have larger ones on average. A single query, whose attention is more peaked than
    that mean, may attend fewer or more. The paper has one threshold for the whole model, which
    `threshold` sets; by default each layer finds its own, which is all that a layer's state knows.
    Keys are clustered by direction, and a centroid is the mean of its keys. The `observed` last
    keys when the state is built, and all that come later, are attended besides. The paper's
    lookup in two levels, which only makes finding cheaper, is left out.
    """

    source: ClassVar[str] = (
        "arXiv:2411.09688 (Squeezed Attention), section 4; SqueezeAILab/SqueezedAttention"
    )
    fitted: ClassVar[bool] = True
    complete: ClassVar[bool] = True

    clusters: float = field(
        default=0.05, metadata={"help": "clusters, as a share of the keys; from memory"}
    )
    observed: int = field(
        default=100, metadata={"help": "last queries that set the threshold, and keys kept apart"}
    )
    threshold: float = field(
        default=0.0, metadata={"help": "a share of attention in place of the budget; 0 for none"}
    )
    iterations: int = field(default=20, metadata={"help": "rounds of k-means"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clusters <= 1:
            raise RetraceError(f"clusters={self.clusters}: expected more than 0, up to 1.")

    def build(self, past: Past) -> Any:
        """The clusters, and the mean shares of the keys of every head of the layer together
        (layer's heads x clustered,), descending."""
        heads = past.heads if not self.threshold else (past,)
        clustered = [self._clusters(head) for head in heads]
        last = slice(-self.observed, None)
        means = [own.shares(*own.past.asked(last)).mean(dim=1) for own in clustered]
        own = clustered[past.group.kv_head if len(heads) > 1 else 0]
        ranked = torch.cat(means).flatten().sort(descending=True).values
        return replace(own, past=past), ranked

    def extend(self, state: Any, new: Past) -> Any:
        """Later keys are not clustered."""
        own, ranked = state
        return replace(own, past=new.whole), ranked

    def attend(
        self, state: Any, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Exact attention over the keys of the clusters above the threshold and all that are not
        clustered, and those keys."""
        own, ranked = state
        logits = visible_logits(own.past, queries, positions)
        shares = own.shares(queries, positions)
        below = shares <= self._threshold(own, ranked, k)
        clustered = slice(own.first, own.first + len(own.labels))
        logits[..., clustered].masked_fill_(below, -torch.inf)
        output = merged([part(logits, own.past.values[: logits.shape[-1]])], own.past.unit.sinks)
        kept = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        kept[clustered] = False
        merit = torch.zeros_like(logits)
        merit[..., clustered] = shares
        return output, attended_ids(~logits.isneginf(), merit, kept)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The centroids and their sizes."""
        return float(len(state[0].centroids) * (group.key_bytes + group.itemsize))

    def _threshold(self, own: Clusters, ranked: Tensor, k: int) -> float:
        """What a key's share must be above."""
        if self.threshold:
            return self.threshold
        heads = len(ranked) // max(1, len(own.labels))
        return float(ranked[heads * k]) if heads * k < len(ranked) else -1.0

    def _clusters(self, past: Past) -> Clusters:
        keys = past.keys[past.hidden : max(0, past.end - self.observed)]
        labels = torch.zeros(0, dtype=torch.int64, device=keys.device)
        count = max(1, round(self.clusters * len(keys)))
        if len(keys):
            directions = torch.nn.functional.normalize(keys, dim=-1)
            labels = kmeans(directions, count, self.iterations)[1]
        sizes = torch.bincount(labels, minlength=count).clamp(min=1)
        centroids = totals(keys, labels, count) / sizes[:, None]
        return Clusters(past=past, centroids=centroids, labels=labels, first=past.hidden)
