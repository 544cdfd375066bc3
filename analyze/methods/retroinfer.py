"""RetroInfer: the nearest clusters exactly, further ones by their mean."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.kmeans import (
    by_direction,
    kmeans_of_each,
    most_alike,
    totals,
)
from retrace.analyze.methods.toolkit.partial_attention import (
    attended_ids,
    attention,
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
        return self.build_each([past])[0]

    def build_each(self, pasts: Sequence[Past]) -> Sequence[Any]:
        """The states of several pasts."""
        firsts = [min(max(self.sink, past.hidden), past.end) for past in pasts]
        lasts = [max(past.end - self.recent, 0) for past in pasts]
        keys = [past.keys[a:b] for past, a, b in zip(pasts, firsts, lasts, strict=True)]
        centred = [own - own.mean(dim=0) for own in keys]
        directions = self._directions(centred)
        labels = [*map(most_alike, centred, directions)]
        return [*map(self._clusters, pasts, firsts, keys, labels, map(len, directions))]

    def extend(self, state: Any, new: Past) -> Any:
        """Later keys are not clustered."""
        return replace(state, past=new.whole)

    def attend(
        self, state: Clusters, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Attention over exact keys and estimated clusters, and the exact keys."""
        past, rules = state.past, state.past.group.rules
        logits = visible_logits(past, queries, positions)
        end, last = logits.shape[-1], state.first + len(state.labels)
        estimates = queries @ state.centroids.T
        seen = whole = None
        if rules.window is not None or rules.chunk is not None:
            oldest_seen = first_visible(positions, rules)[:, None]
            seen = state.newest >= oldest_seen
            # Of a cluster that reaches out of a window it is not known how much is seen.
            whole = state.oldest >= oldest_seen
        rank, retrieved = self._rank(state, estimates, seen, k)
        left_out = (rank < retrieved) | (rank >= retrieved + self._estimated(len(state.sizes)))
        left_out = left_out if whole is None else left_out | ~whole
        of_clusters = softcap(estimates, rules) + state.sizes.log()
        of_clusters = of_clusters.masked_fill(left_out, -torch.inf)
        ranks = rank[:, state.labels]
        logits[..., state.first : last].masked_fill_(ranks >= retrieved, -torch.inf)
        together = torch.cat([logits, of_clusters], dim=-1)
        values = torch.cat([past.values[:end], state.values])
        kept = torch.ones(end, dtype=torch.bool, device=logits.device)
        kept[state.first : last] = False
        # All heads attend the same keys.
        attended = ~logits[:1].isneginf()
        ids = attended_ids(attended, pad(-ranks, (state.first, end - last)), kept, state.first)
        output = attention(together, values, past.unit.sinks)
        return output, ids.expand(len(queries), -1, -1)

    def aux_bytes(self, state: Clusters, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The centroids, and of those estimated the mean value and the size."""
        clusters = len(state.sizes)
        known = group.value_bytes + group.itemsize
        return float(clusters * group.key_bytes + self._estimated(clusters) * known)

    def _rank(
        self, state: Clusters, estimates: Tensor, seen: Tensor | None, k: int
    ) -> tuple[Tensor, Tensor]:
        """The rank of each cluster (queries, clusters), and how many of the first are retrieved
        (queries, 1); clusters without a key that is `seen` (queries, clusters) are the last."""
        if seen is None:
            together = estimates.softmax(dim=-1).sum(dim=0)
        else:
            shares = estimates.masked_fill(~seen, -torch.inf).softmax(dim=-1)
            together = shares.nan_to_num(0.0).sum(dim=0).masked_fill(~seen, -1.0)
        order = together.argsort(dim=-1, descending=True, stable=True)
        held = state.sizes[order].cumsum(dim=-1) <= k
        places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, places)
        # At least the nearest cluster, however large.
        return rank, held.sum(dim=-1, keepdim=True).clamp(min=1)

    def _estimated(self, clusters: int) -> int:
        return round(self.estimate * clusters)

    def _directions(self, keys: Sequence[Tensor]) -> list[Tensor]:
        """Vectors (clusters, channels) in the directions that several lots of keys gather around,
        segment by segment; one at least."""
        segments = [torch.split(own, self.segment)[: len(own)] for own in keys]
        every = [segment for own in segments for segment in own]
        counts = [max(1, len(segment) // self.size) for segment in every]
        found = iter(kmeans_of_each(every, counts, self.iterations - 1, by_direction))
        return [
            torch.cat([next(found)[0] for _ in some] or [own.new_zeros(1, own.shape[1])])
            for own, some in zip(keys, segments, strict=True)
        ]

    @staticmethod
    def _clusters(past: Past, first: int, keys: Tensor, labels: Tensor, most: int) -> Clusters:
        """What is known of those clusters of some keys, the first at position `first`, that have
        any."""
        values = past.values[first : first + len(keys)]
        sums, sizes = totals(torch.cat([keys, values], dim=-1), labels, most)
        left = sizes.nonzero().squeeze(-1)
        labels = ((sizes > 0).cumsum(dim=0) - 1)[labels]
        sizes = sizes[left]
        means = sums[left] / sizes[:, None]
        places = torch.arange(first, first + len(labels), device=labels.device)
        oldest = places.new_full((len(sizes),), past.end).scatter_reduce_(0, labels, places, "amin")
        newest = torch.zeros_like(oldest).scatter_reduce_(0, labels, places, "amax")
        return Clusters(
            past=past,
            centroids=means[:, : keys.shape[1]].contiguous(),
            values=means[:, keys.shape[1] :].contiguous(),
            sizes=sizes,
            oldest=oldest,
            newest=newest,
            labels=labels,
            first=first,
        )
