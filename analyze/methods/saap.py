"""SAAP: keys in parts by the nearest centroid, and a network that knows where a query looks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import KEEP, LearnedLike, ScoreMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.toolkit.kmeans import kmeans, nearest
from retrace.analyze.methods.toolkit.training import (
    descend,
    drawn_queries,
    initial_weights,
    network,
)
from retrace.analyze.units.attention import visible
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules

RATE = 3e-3
LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class SAAP(ScoreMethod):
    """Keys belong to the part whose centroid is nearest; a network per query head ranks the parts
    by the attention mass that it expects there, and whole parts are attended until the budget is
    full. Of the last one the earliest keys are taken.

    Centroids and networks are learnt from other sequences, from keys and queries before position
    encoding; the network by cross entropy with the mass in each part. Later keys join the part of
    the nearest centroid as they come. The first key and the last 2,048 are kept, and the latter
    take at most half the budget: all of them from k = 4,096 on. How many parts, how wide the
    network and how long it trains are chosen here, for contexts of some thousand keys.
    """

    source: ClassVar[str] = "arXiv:2502.08246 (SAAP), section 4"
    calibrated: ClassVar[bool] = True

    parts: int = field(default=64, metadata={"help": "parts of the keys"})
    hidden: int = field(default=64, metadata={"help": "width of the network's hidden layer"})
    steps: int = field(default=100, metadata={"help": "steps of training", "least": 0})
    batch: int = field(default=32, metadata={"help": "queries in a step"})
    iterations: int = field(default=10, metadata={"help": "rounds of k-means"})
    seed: int = field(default=0, metadata={"help": "of the training", "least": 0})
    keep: Keep = field(
        default=Keep(sink=1, sink_most=0.25, recent=2048, recent_most=0.5), metadata=KEEP
    )

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """`centroids` (parts, channels), and the networks' weights `0` and `1`
        (group, inputs, outputs)."""
        random = torch.Generator().manual_seed(self.seed)
        keys = torch.cat([past.keys_before_rotation for past in pasts])
        centroids = kmeans(keys, self.parts, self.iterations)[0]
        sizes = (keys.shape[1], self.hidden, len(centroids))
        initial = initial_weights(pasts[0].group.rules.group, sizes, random)
        weights = [layer.to(keys.device).requires_grad_() for layer in initial]
        labels = [nearest(past.keys_before_rotation, centroids) for past in pasts]
        descent = torch.optim.Adam(weights, lr=RATE)

        def loss() -> Tensor:
            """For `batch` queries of a sequence, both drawn, of every head."""
            drawn, rows = drawn_queries(pasts, self.batch, random)
            past = pasts[drawn]
            mass = self._mass(past, rows, labels[drawn], len(centroids))
            asked = network(weights, past.queries_before_rotation[:, rows])
            return -(mass * asked.log_softmax(dim=-1)).sum(dim=-1).mean()

        descend(descent, self.steps, loss)
        return {"centroids": centroids} | {str(i): w.detach() for i, w in enumerate(weights)}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        # There are fewer parts where there are fewer keys.
        sizes = {
            "centroids": (None, rules.key_dim),
            "0": (rules.group, rules.key_dim + 1, self.hidden),
            "1": (rules.group, self.hidden + 1, None),
        }
        return {name: (torch.float32, size) for name, size in sizes.items()}

    def build(self, past: Past) -> Any:
        """The past, and the part of each key (keys,)."""
        return past, nearest(past.keys_before_rotation, past.calibration["centroids"])

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """What the network gives for each key's part; the mean query's by the first head's."""
        past, labels = state
        rows = torch.searchsorted(past.query_positions, positions)
        asked = past.queries_before_rotation[:, rows]
        if len(queries) < len(asked):
            asked = asked.mean(dim=0, keepdim=True)
        layers = [past.calibration[str(i)] for i in range(LAYERS)]
        return network(layers, asked)[..., labels[: int(positions[-1]) + 1]]

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The network's weights, for each head its own."""
        calibration = state[0].calibration
        return float(sum(calibration[str(i)].numel() for i in range(LAYERS)) * group.itemsize)

    @staticmethod
    def _mass(past: Past, rows: Tensor, labels: Tensor, parts: int) -> Tensor:
        """Attention mass (group, rows, parts) of queries in each part, without what heads put on
        the first key, which is always kept."""
        queries, positions = past.queries[:, rows], past.query_positions[rows]
        keys = torch.arange(1, past.end, device=positions.device)
        seen = visible(positions, keys, past.group.rules)
        logits = (queries @ past.keys[1:].T).masked_fill(~seen, -torch.inf)
        share = logits.softmax(dim=-1).nan_to_num(0.0)
        mass = share.new_zeros(*share.shape[:2], parts)
        return mass.index_add_(-1, labels[1:], share)
