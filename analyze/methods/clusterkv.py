"""ClusterKV: whole clusters of keys that point the same way."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.clusters import kmeans
from retrace.analyze.keep import Keep
from retrace.analyze.methods.base import KEEP, ScoreMethod
from retrace.analyze.past import Past
from retrace.analyze.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class ClusterKV(ScoreMethod):
    """Clusters of keys, ranked by the query's product with their centroid, until the budget is
    full; of the last cluster the earliest keys are taken.

    Keys are clustered by direction, and a centroid is the mean of its keys' directions. Keys that
    come later are all attended, as in the accuracy code; the paper clusters them anew every few
    hundred tokens.
    """

    source: ClassVar[str] = "arXiv:2412.03213 (ClusterKV), section 3; sjtu-zhao-lab/ClusterKV"
    fitted: ClassVar[bool] = True
    keeps_new: ClassVar[bool] = True

    size: int = field(default=80, metadata={"help": "keys in a cluster, on average"})
    iterations: int = field(default=20, metadata={"help": "rounds of k-means"})
    keep: Keep = field(default=Keep(sink=16, sink_most=0.25), metadata=KEEP)

    def build(self, past: Past) -> Any:
        """Centroids (clusters, channels) and each key's cluster (keys,)."""
        directions = torch.nn.functional.normalize(past.keys, dim=-1)
        count = max(1, len(past.keys) // self.size)
        return kmeans(directions, count, self.iterations)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """q.c of each key's cluster."""
        centroids, labels = state
        scores: Tensor = (queries @ centroids.T)[..., labels[: int(positions[-1]) + 1]]
        return scores

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The centroids."""
        return float(len(state[0]) * group.key_bytes)
