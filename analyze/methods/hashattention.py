"""HashAttention: signatures of bits by small learned networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import LearnedLike, ScoreMethod
from retrace.analyze.methods.toolkit.hashing import signs
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


@dataclass(frozen=True, kw_only=True)
class HashAttention(ScoreMethod):
    """Scores keys by how many of `bits` signs agree, of one network for a head's queries and
    another for the keys.

    The networks are trained to tell the `positives` keys of largest exp(logit) ||v|| from the rest,
    by cross entropy weighted so that both count alike, with tanh in place of sign. The code that is
    public only infers: sizes of hidden layers, the rate and the number of steps are chosen here,
    small enough to train for every head of a model: `hidden=128,steps=300` finds a little more.
    """

    source: ClassVar[str] = (
        "arXiv:2412.14468 (HashAttention), section 4; xAlg-ai/sparse-attention-hub"
    )
    calibrated: ClassVar[bool] = True

    bits: int = field(default=32, metadata={"help": "bits of a signature"})
    hidden: int = field(default=64, metadata={"help": "width of the two hidden layers"})
    positives: int = field(
        default=64, metadata={"help": "best keys of a query, at most a tenth of those it sees"}
    )
    steps: int = field(default=60, metadata={"help": "steps of training", "least": 0})
    batch: int = field(default=16, metadata={"help": "queries in a step"})
    seed: int = field(default=0, metadata={"help": "of the training", "least": 0})

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """Weights `query.0` to `query.2` and `key.0` to `key.2` (group, inputs, outputs), the last
        input of each always 1."""
        random = torch.Generator().manual_seed(self.seed)
        device, (heads, _, channels) = pasts[0].keys.device, pasts[0].queries.shape
        sizes = (channels, self.hidden, self.hidden, self.bits)
        weights = {
            f"{side}.{i}": layer.to(device)
            for side in ("query", "key")
            for i, layer in enumerate(initial_weights(heads, sizes, random))
        }
        descent = torch.optim.Adam([w.requires_grad_() for w in weights.values()], lr=RATE)
        descend(descent, self.steps, lambda: self._loss(weights, pasts, random))
        return {name: w.detach() for name, w in weights.items()}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        sizes = (rules.key_dim, self.hidden, self.hidden, self.bits)
        return {
            f"{side}.{i}": (torch.float32, (rules.group, inputs + 1, outputs))
            for side in ("query", "key")
            for i, (inputs, outputs) in enumerate(pairwise(sizes))
        }

    def _loss(
        self, weights: Mapping[str, Tensor], pasts: Sequence[Past], random: torch.Generator
    ) -> Tensor:
        """For `batch` queries of a sequence, both drawn, of every head."""
        which, rows = drawn_queries(pasts, self.batch, random)
        past = pasts[which]
        queries, positions = past.queries[:, rows], past.query_positions[rows]
        keys = torch.arange(past.start, past.end, device=rows.device)
        seen = visible(positions, keys, past.group.rules)
        count = seen.sum(dim=-1, keepdim=True)
        worth = queries @ past.keys.T + past.values.norm(dim=-1).clamp(min=1e-12).log()
        ranks = worth.masked_fill(~seen, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        most = (count // 10).clamp(min=1, max=self.positives)
        chosen = torch.arange(len(keys), device=rows.device) < most
        best = torch.zeros_like(worth).scatter(-1, ranks, chosen.to(worth).expand_as(worth))
        asked = torch.tanh(_network(weights, "query", queries / past.group.rules.scale))
        codes = torch.tanh(_network(weights, "key", past.keys))
        agreement = asked @ codes.mT / self.bits**0.5
        # Each query's best count as much together as all others that it sees.
        balanced = torch.where(best > 0, 1 / most, seen / (count - most).clamp(min=1))
        return torch.nn.functional.binary_cross_entropy_with_logits(
            agreement, best, weight=balanced, reduction="sum"
        ) / (2 * best.shape[0] * best.shape[1])

    def build(self, past: Past) -> Any:
        """The weights, the layer's scale, and every key's signature for each head
        (group, keys, bits)."""
        weights = past.calibration
        return weights, past.group.rules.scale, signs(_network(weights, "key", past.keys))

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """Less the number of bits that differ; by the first head's networks for a mean query."""
        weights, scale, codes = state
        asked = signs(_network(weights, "query", queries / scale))
        agreement = asked @ codes[: len(queries), : int(positions[-1]) + 1].mT
        scores: Tensor = (agreement - codes.shape[-1]) / 2
        return scores

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Every key's bits and the network of queries, for each head its own."""
        sizes = (group.rules.key_dim, self.hidden, self.hidden, self.bits)
        network = sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))
        return group.rules.group * (keys * self.bits / 8 + network * group.itemsize)


def _network(weights: Mapping[str, Tensor], side: str, vectors: Tensor) -> Tensor:
    """The network of queries or of keys, with two hidden layers (heads, vectors, bits)."""
    return network([weights[f"{side}.{i}"] for i in range(3)], vectors)
