"""RetroInfer: the nearest clusters exactly, further ones by their mean."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.kmeans import totals
from retrace.analyze.methods.toolkit.partial_attention import (
    attended_ids,
    merged,
    part,
    visible_logits,
)
from retrace.analyze.units.attention import first_visible, softcap
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """The clusters of a past, and what is known of each."""

    past: Past
    """All keys so far, later ones than are clustered included."""
    centroids: Tensor
    """(clusters, channels): mean key"""
    values: Tensor
    """(clusters, value channels): mean value"""
    sizes: Tensor
    """(clusters,)"""
    oldest: Tensor
    """(clusters,): first member"""
    newest: Tensor
    """(clusters,): last member"""
    labels: Tensor
    """(keys,): cluster of each clustered key"""
    first: int
    """The first key that is clustered."""


@dataclass(frozen=True, kw_only=True)
class RetroInfer(AttendMethod):
    """Keys of the clusters nearest to the group, as many whole clusters as k keys hold, and sinks
    and recent keys exactly; the next clusters by their mean key, mean value and size; the rest not
    at all.

    Clusters rank by the sum of the heads' softmax over centroids. The paper retrieves 1.8 % of them
    and estimates 23.2 % (`estimate=0` switches that off). Keys are centred and clustered by inner
    product, segment by segment; a last round over all segments takes plain means. The last `recent`
    keys when the state is built, and all that come later, are exact: the paper clusters them in
    runs of 1,024, as the protocol `all:1024` does.
    """

    source: ClassVar[str] = "arXiv:2505.02922 (RetroInfer), section 4; microsoft/RetrievalAttention"
    fitted: ClassVar[bool] = True

    size: int = field(default=16, metadata={"help": "keys in a cluster, on average"})
    segment: int = field(default=8192, metadata={"help": "keys that are clustered together"})
    iterations: int = field(default=10, metadata={"help": "rounds of k-means"})
    estimate: float = field(default=0.232, metadata={"help": "share of clusters estimated"})
    sink: int = field(default=4, metadata={"help": "first keys, always exact", "least": 0})
    recent: int = field(default=64, metadata={"help": "last keys, always exact", "least": 0})

    def build(self, past: Past) -> Any:
        """Clusters of the keys between sinks and recent ones."""
        first = min(max(self.sink, past.hidden), past.end)
        last = max(past.end - self.recent, 0)
        keys, values = past.keys[first:last], past.values[first:last]
        labels = self._labels(keys)
        # Clusters that have lost all their keys are left out.
        every = torch.bincount(labels)
        labels = ((every > 0).cumsum(dim=0) - 1)[labels]
        sizes = every[every > 0]
        means = [totals(part, labels, len(sizes)) / sizes[:, None] for part in (keys, values)]
        places = torch.arange(first, first + len(labels), device=labels.device)
        oldest = places.new_full((len(sizes),), past.end).scatter_reduce_(0, labels, places, "amin")
        newest = torch.zeros_like(oldest).scatter_reduce_(0, labels, places, "amax")
        return Clusters(
            past=past,
            centroids=means[0],
            values=means[1],
            sizes=sizes,
            oldest=oldest,
            newest=newest,
            labels=labels,
            first=first,
        )

    def extend(self, state: Any, new: Past) -> Any:
        """Later keys are not clustered."""
        return replace(state, past=new.whole)

    def attend(
        self, state: Clusters, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Attention over exact keys and estimated clusters, and the exact keys."""
        logits = visible_logits(state.past, queries, positions)
        rules, clusters = state.past.group.rules, len(state.sizes)
        estimates = queries @ state.centroids.T
        oldest_seen = first_visible(positions, rules)[:, None]
        retrieved, estimated, rank = self._choose(state, estimates, state.newest >= oldest_seen, k)
        exact = torch.ones(len(positions), logits.shape[-1], dtype=torch.bool, device=logits.device)
        clustered = slice(state.first, state.first + len(state.labels))
        exact[:, clustered] = retrieved[:, state.labels]
        # Of a cluster that reaches out of a window it is not known how much is seen.
        estimated &= state.oldest >= oldest_seen
        cluster_logits = softcap(estimates, rules) + state.sizes.log()
        attended = logits.masked_fill(~exact, -torch.inf)
        parts = [part(attended, state.past.values[: logits.shape[-1]])]
        if clusters:
            hidden = cluster_logits.masked_fill(~estimated, -torch.inf)
            parts.append(part(hidden, state.values))
        kept = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        kept[clustered] = False
        merit = torch.zeros(exact.shape, device=logits.device)
        merit[:, clustered] = -rank[:, state.labels].float()
        ids = attended_ids(~attended.isneginf(), merit, kept, state.first)
        return merged(parts, state.past.unit.sinks), ids

    def aux_bytes(self, state: Clusters, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The centroids, and of those estimated the mean value and the size."""
        clusters = len(state.sizes)
        known = group.value_bytes + group.itemsize
        return float(clusters * group.key_bytes + self._estimated(clusters) * known)

    def _choose(
        self, state: Clusters, estimates: Tensor, seen: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which clusters are retrieved, and which are estimated, of those that have a key that is
        seen: bool (queries, clusters), as all of these are; and the rank of each."""
        estimates = estimates.masked_fill(~seen, -torch.inf)
        together = estimates.softmax(dim=-1).nan_to_num(0.0).sum(dim=0).masked_fill(~seen, -1.0)
        order = together.argsort(dim=-1, descending=True, stable=True)
        held = state.sizes[order].cumsum(dim=-1) <= k
        held[:, :1] = True  # of the nearest cluster, however large
        count = held.sum(dim=-1, keepdim=True)
        rank = order.argsort(dim=-1)
        retrieved = rank < count
        return retrieved, ~retrieved & (rank < count + self._estimated(len(state.sizes))), rank

    def _estimated(self, clusters: int) -> int:
        return round(self.estimate * clusters)

    def _labels(self, keys: Tensor) -> Tensor:
        """The cluster of each key (keys,)."""
        if not len(keys):
            return torch.zeros(0, dtype=torch.int64, device=keys.device)
        centred = keys - keys.mean(dim=0)
        centroids = [self._directions(part) for part in torch.split(centred, self.segment)]
        return (centred @ torch.cat(centroids).T).argmax(dim=-1)

    def _directions(self, keys: Tensor) -> Tensor:
        """Unit vectors (clusters, channels) that the keys of a segment gather around."""
        count = max(1, len(keys) // self.size)
        spaced = torch.arange(count, device=keys.device) * len(keys) // count
        centroids = torch.nn.functional.normalize(keys[spaced], dim=-1)
        for _ in range(self.iterations - 1):
            labels = (keys @ centroids.T).argmax(dim=-1)
            sums = totals(keys, labels, count)
            moved = torch.nn.functional.normalize(sums, dim=-1)
            empty = torch.bincount(labels, minlength=count) == 0
            centroids = torch.where(empty[:, None], centroids, moved)
        return centroids
