"""The lightning indexer of DeepSeek sparse attention, fitted to a layer of any model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, relu

from retrace.analyze.methods.base import LearnedLike, Learns, ScoreMethod
from retrace.analyze.methods.toolkit.hashing import hadamard, padded
from retrace.analyze.methods.toolkit.quantisation import fp8
from retrace.analyze.methods.toolkit.training import descend, drawn_queries
from retrace.analyze.units.attention import visible
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules

RATE = 1e-3
SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class DSAIndexer(ScoreMethod):
    """One ranking for all heads of a layer, by a small network: the sum over indexer heads j of
    w_j ReLU(q_j.k), where each token has one k of a few `channels`, kept in FP8.

    q_j, w_j and k are linear in all the queries and keys of the layer at a token's position, as
    attention sees them, where DeepSeek's come from hidden states and turn half of the channels with
    the position. It is fitted by the loss of the dense warm-up, the divergence of softmax(scores)
    from the attention of all heads together. DeepSeek takes 1000 steps with 64 heads of 128
    channels, for a layer of 128 heads; the numbers here fit smaller ones.
    """

    source: ClassVar[str] = "DeepSeek-V3.2-Exp report, section 1; deepseek-ai/DeepSeek-V3.2-Exp"
    calibrated: ClassVar[bool] = True
    learns: ClassVar[Learns] = "layer"

    heads: int = field(default=16, metadata={"help": "heads of the indexer"})
    channels: int = field(default=64, metadata={"help": "channels of a token's key"})
    steps: int = field(default=100, metadata={"help": "steps of training", "least": 0})
    batch: int = field(default=16, metadata={"help": "queries in a step"})
    seed: int = field(default=0, metadata={"help": "of the training", "least": 0})

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """`query` (all query channels, heads * channels), `weight` (the same and one that is always
        1, heads), `key` (all key channels, channels), and the key's `gain` and `bias`."""
        random = torch.Generator().manual_seed(self.seed)
        device, rules = pasts[0].keys.device, pasts[0].group.rules
        asked, held = rules.heads * rules.key_dim, rules.kv_heads * rules.key_dim
        weights = {
            "query": torch.randn(asked, self.heads * self.channels, generator=random) / asked**0.5,
            "key": torch.randn(held, self.channels, generator=random) / held**0.5,
            # All heads count alike at first.
            "weight": torch.cat([torch.zeros(asked, self.heads), torch.ones(1, self.heads)]),
            "gain": torch.ones(self.channels),
            "bias": torch.zeros(self.channels),
        }
        weights = {name: w.to(device).requires_grad_() for name, w in weights.items()}
        descent = torch.optim.Adam(weights.values(), lr=RATE)
        descend(descent, self.steps, lambda: self._loss(weights, pasts, random))
        return {name: w.detach() for name, w in weights.items()}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        asked, held = rules.heads * rules.key_dim, rules.kv_heads * rules.key_dim
        sizes = {
            "query": (asked, self.heads * self.channels),
            "key": (held, self.channels),
            "weight": (asked + 1, self.heads),
            "gain": (self.channels,),
            "bias": (self.channels,),
        }
        return {name: (torch.float32, size) for name, size in sizes.items()}

    def _loss(
        self, weights: Mapping[str, Tensor], pasts: Sequence[Past], random: torch.Generator
    ) -> Tensor:
        """KL(attention summed over heads, to a sum of 1 || softmax(scores)), the mean over `batch`
        queries of a sequence, both drawn."""
        which, rows = drawn_queries(pasts, self.batch, random)
        past = pasts[which]
        attention = torch.stack([head.attention(rows).sum(dim=0) for head in past.heads]).sum(dim=0)
        attention = attention / attention.sum(dim=-1, keepdim=True)
        keys = torch.arange(past.end, device=rows.device)
        seen = visible(past.query_positions[rows], keys, past.group.rules)
        queries, shares = _asked(weights, past, rows)
        scores = _index(queries, shares, _held(weights, past)).masked_fill(~seen, -torch.inf)
        logs = torch.log_softmax(scores, dim=-1).masked_fill(~seen, 0.0)
        # Less the entropy of the attention, which has no slope.
        return -(attention * logs).sum(dim=-1).mean()

    def build(self, past: Past) -> Any:
        """The weights, every token's key (keys, padded channels) as FP8 gives it back, and the
        past."""
        return past.calibration, fp8(hadamard(_held(past.calibration, past))), past

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """The same for all heads of the layer."""
        weights, held, past = state
        rows = torch.searchsorted(past.query_positions, positions)
        asked, shares = _asked(weights, past, rows)
        scores = _index(fp8(hadamard(asked)), shares, held[: int(positions[-1]) + 1])
        return scores.expand(len(queries), -1, -1)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """A kv head's share of what the layer reads once: every token's key, a byte a channel, with
        its scale, and the weights that queries meet."""
        rules = group.rules
        asked = rules.heads * rules.key_dim
        weights = self.heads * (asked * self.channels + asked + 1) * group.itemsize
        return (keys * (padded(self.channels) + SCALE_BYTES) + weights) / rules.kv_heads


def _held(weights: Mapping[str, Tensor], past: Past) -> Tensor:
    """Every token's key (keys, channels): linear, then normalised, so that none stands out."""
    keys = torch.cat([head.keys for head in past.heads], dim=-1) @ weights["key"]
    return layer_norm(keys, keys.shape[-1:], weights["gain"], weights["bias"])


def _asked(weights: Mapping[str, Tensor], past: Past, rows: Tensor) -> tuple[Tensor, Tensor]:
    """For some rows of queries, q_j (heads, queries, channels) and w_j (heads, queries)."""
    given = torch.cat([q for head in past.heads for q in head.queries[:, rows]], dim=-1)
    given = given / past.group.rules.scale
    shares = given @ weights["weight"][:-1] + weights["weight"][-1]
    heads, channels = shares.shape[-1], len(weights["gain"])
    queries = (given @ weights["query"]).view(-1, heads, channels).transpose(0, 1)
    return queries, shares.T * (heads * channels) ** -0.5


def _index(queries: Tensor, shares: Tensor, keys: Tensor) -> Tensor:
    """sum_j w_j ReLU(q_j.k) (queries, keys), head by head, since all at once are many."""
    scores = queries.new_zeros(queries.shape[1], len(keys))
    for query, share in zip(queries, shares, strict=True):
        scores = scores + share[:, None] * relu(query @ keys.T)
    return scores
