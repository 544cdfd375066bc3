"""Squeezed Attention: clusters whose share of attention passes a threshold that heads share."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.kmeans import kmeans_of_each, totals
from retrace.analyze.methods.toolkit.partial_attention import (
    attended_ids,
    attention,
    visible_logits,
)
from retrace.analyze.units.attention import softcap, visible
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup, scores_at_once
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """The clusters of a past's keys."""

    past: Past
    """With later keys, which are not clustered."""
    centroids: Tensor
    """(clusters, channels): mean key"""
    sizes: Tensor
    """(clusters,): keys of each"""
    labels: Tensor
    """(clustered,): the cluster of each clustered key"""
    first: int
    """The first key that is clustered."""

    def shares(self, queries: Tensor, positions: Tensor) -> Tensor:
        """The estimated share of attention of each clustered key (group, queries, clustered), for
        scaled queries (group, queries, channels) of positions after all of them: exp(q.c) of its
        centroid c over the sum of that for all that the query sees; 0 where it does not see the
        key."""
        rules = self.past.group.rules
        estimates = softcap(queries @ self.centroids.T, rules)
        if rules.window is None and rules.chunk is None:
            # The keys of a cluster have the same share.
            together = (estimates + self.sizes.log()).softmax(dim=-1)
            return (together / self.sizes)[..., self.labels]
        return _among_seen(estimates[..., self.labels], self.past, self.first, positions)


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
        return self.build_each([past])[0]

    def build_each(self, pasts: Sequence[Past]) -> Sequence[Any]:
        """The states of several pasts."""
        heads = [past.heads if not self.threshold else (past,) for past in pasts]
        keys = [
            torch.stack([head.keys[past.hidden : max(0, past.end - self.observed)] for head in own])
            for past, own in zip(pasts, heads, strict=True)
        ]
        counts = [max(1, round(self.clusters * own.shape[1])) for own in keys]
        directions = [normalize(own, dim=-1) for own in keys]
        found = kmeans_of_each(directions, counts, self.iterations)
        labels = [of_each for _, of_each in found]
        return [*map(self._state, pasts, heads, keys, labels, counts)]

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
        end, last = logits.shape[-1], own.first + len(own.labels)
        shares = own.shares(queries, positions)
        below = shares <= self._threshold(own, ranked, k)
        logits[..., own.first : last].masked_fill_(below, -torch.inf)
        output = attention(logits, own.past.values[:end], own.past.unit.sinks)
        kept = torch.ones(end, dtype=torch.bool, device=logits.device)
        kept[own.first : last] = False
        merit = pad(shares, (own.first, end - last))
        return output, attended_ids(~logits.isneginf(), merit, kept)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The centroids and their sizes."""
        return float(len(state[0].centroids) * (group.key_bytes + group.itemsize))

    def _threshold(self, own: Clusters, ranked: Tensor, k: int) -> Tensor | float:
        """What a key's share must be above."""
        if self.threshold:
            return self.threshold
        heads = len(ranked) // max(1, len(own.labels))
        return ranked[heads * k] if heads * k < len(ranked) else -1.0

    def _state(
        self, past: Past, heads: Sequence[Past], keys: Tensor, labels: Tensor, count: int
    ) -> tuple[Clusters, Tensor]:
        """The state by the clusters, labels (heads, clustered), of the keys (heads, clustered,
        channels) of some heads of the layer."""
        sums, sizes = totals(keys, labels, count)
        centroids = sums / sizes.clamp(min=1)[..., None]
        positions = past.asked(slice(-self.observed, None))[1]
        rows = torch.searchsorted(past.unit.positions, positions)
        rules = past.group.rules
        queries = torch.stack([head.unit.queries[:, rows] for head in heads]) * rules.scale
        of_one = queries[0, ..., 0].numel() * keys.shape[1]
        at_once = max(1, scores_at_once(keys.device) // max(1, of_one))
        means = []
        for first in range(0, len(heads), at_once):
            own = slice(first, first + at_once)
            estimates = softcap(queries[own] @ centroids[own, None].mT, rules)
            of_keys = labels[own, None, None].expand(-1, *queries.shape[1:3], -1)
            shares = _among_seen(estimates.gather(-1, of_keys), past, past.hidden, positions)
            means.append(shares.mean(dim=2))
        ranked = torch.cat(means).flatten().sort(descending=True).values
        at = past.group.kv_head if len(heads) > 1 else 0
        # Copies, since a view would hold on to all heads.
        clusters = Clusters(
            past=past,
            centroids=centroids[at].clone(),
            sizes=sizes[at].clone(),
            labels=labels[at].clone(),
            first=past.hidden,
        )
        return clusters, ranked


def _among_seen(estimates: Tensor, past: Past, first: int, positions: Tensor) -> Tensor:
    """Shares of attention (..., queries, clustered) by estimated logits of that shape, of keys from
    the first on, among those of them that queries at positions (queries,) see."""
    keys = first + torch.arange(estimates.shape[-1], device=positions.device)
    seen = visible(positions, keys, past.group.rules)
    return estimates.masked_fill(~seen, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
