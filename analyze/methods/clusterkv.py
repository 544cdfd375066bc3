"""ClusterKV: whole clusters of keys that point the same way."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from retrace.analyze.methods.base import KEEP, ScoreMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.toolkit.kmeans import by_direction, kmeans_of_each, most_alike
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class ClusterKV(ScoreMethod):
    """Clusters of keys, ranked by the query's product with their centroid, until the budget is
    full; of the last cluster the earliest keys are taken.

    Keys join the centroid of most alike direction, and a centroid is the mean of its keys. Sinks
    have no part in it; they take at most a quarter of the budget, so that the published 16 hold
    from k = 64 on. Keys that come later are all attended, as in the accuracy code; the paper
    clusters them anew every few hundred tokens.
    """

    source: ClassVar[str] = "arXiv:2412.03213 (ClusterKV), section 3; sjtu-zhao-lab/ClusterKV"
    fitted: ClassVar[bool] = True
    keeps_new: ClassVar[bool] = True

    size: int = field(default=80, metadata={"help": "keys in a cluster, on average"})
    iterations: int = field(default=20, metadata={"help": "rounds of k-means"})
    keep: Keep = field(default=Keep(sink=16, sink_most=0.25), metadata=KEEP)

    def build(self, past: Past) -> Any:
        """Centroids (clusters, channels) and each key's cluster (keys,)."""
        return self.build_each([past])[0]

    def build_each(self, pasts: Sequence[Past]) -> Sequence[Any]:
        """The states of several pasts."""
        keys = [self._clustered(past) for past in pasts]
        counts = [max(1, len(own) // self.size) for own in keys]
        found = kmeans_of_each(keys, counts, self.iterations, by_direction)
        return [
            (centroids, most_alike(past.keys, centroids))
            for past, (centroids, _) in zip(pasts, found, strict=True)
        ]

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """q.c of each key's cluster."""
        centroids, labels = state
        scores: Tensor = (queries @ centroids.T)[..., labels[: int(positions[-1]) + 1]]
        return scores

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The centroids."""
        return float(len(state[0]) * group.key_bytes)

    def _clustered(self, past: Past) -> Tensor:
        """The keys that clusters are made of (keys, channels): without sinks, unless there are no
        others, and without those that no later query sees."""
        first = self.keep.sink if past.end > self.keep.sink else 0
        return past.keys[max(first, min(past.hidden, past.end - 1)) :]
