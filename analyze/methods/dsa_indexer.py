"""The lightning indexer of DeepSeek's sparse attention, fitted to a model that has none."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.attention import visible
from retrace.analyze.methods.base import ScoreMethod
from retrace.analyze.past import Past
from retrace.analyze.training import descend
from retrace.analyze.unit import HeadGroup

RATE = 3e-3
NAMES = ("query", "key", "weight")


@dataclass(frozen=True, kw_only=True)
class DSAIndexer(ScoreMethod):
    """Scores keys by sum_j w_j ReLU(q_j.k) over a few small indexer heads j; the index key k is one
    for all of them, and all heads of the layer attend the same keys.

    The indexer's q, w and k are linear in what it sees of a position. In DeepSeek-V3.2 that is the
    hidden state, and 64 heads of 128 channels are trained with the model; here it is the layer's
    queries and keys side by side, as attention sees them, and fewer and smaller heads are fitted by
    the published warm-up loss: the divergence of its softmax from the attention of all heads
    together. On a model with an indexer of its own this one does not use it.
    """

    source: ClassVar[str] = "deepseek-ai/DeepSeek-V3.2-Exp, section 2.1"
    calibrated: ClassVar[bool] = True

    heads: int = field(default=8, metadata={"help": "heads of the indexer"})
    channels: int = field(default=32, metadata={"help": "channels of its keys and queries"})
    steps: int = field(default=100, metadata={"help": "steps of training", "least": 0})
    batch: int = field(default=16, metadata={"help": "queries in a step"})
    seed: int = field(default=0, metadata={"help": "of the training", "least": 0})

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """The maps `query` (layer queries, heads x channels), `key` (layer keys, channels) and
        `weight` (layer queries, heads): the same for every kv head."""
        random = torch.Generator().manual_seed(self.seed)
        layers = [past.heads for past in pasts]
        asked = [_queries(layer) for layer in layers]
        held = [_keys(layer) for layer in layers]
        wide, narrow = asked[0].shape[1], held[0].shape[1]
        sizes = ((wide, self.heads * self.channels), (narrow, self.channels), (wide, self.heads))
        maps = [
            (torch.randn(*size, generator=random) / size[0] ** 0.5).to(held[0].device)
            for size in sizes
        ]
        descent = torch.optim.Adam([m.requires_grad_() for m in maps], lr=RATE)

        def loss() -> Tensor:
            """For `batch` queries of a sequence, both drawn."""
            drawn = int(torch.randint(len(pasts), (), generator=random))
            past = pasts[drawn]
            rows = torch.randint(len(past.query_positions), (self.batch,), generator=random)
            rows = rows.sort().values.to(past.keys.device)
            positions = past.query_positions[rows]
            keys = torch.arange(past.end, device=rows.device)
            seen = visible(positions, keys, past.group.rules)
            together = [_attention(head, rows, seen) for head in layers[drawn]]
            target = torch.stack(together).sum(dim=0) / past.group.rules.heads
            scores = self._scores(
                dict(zip(NAMES, maps, strict=True)), asked[drawn][rows], held[drawn]
            )
            estimate = scores.masked_fill(~seen, -torch.inf).log_softmax(dim=-1)
            return -(target * estimate.masked_fill(~seen, 0.0)).sum(dim=-1).mean()

        descend(descent, self.steps, loss)
        return dict(zip(NAMES, (m.detach() for m in maps), strict=True))

    def build(self, past: Past) -> Any:
        """All kv heads, and the index keys (keys, channels)."""
        heads = past.heads
        return past, heads, _keys(heads) @ past.calibration["key"]

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """The indexer's score, the same for every head."""
        past, heads, index = state
        rows = torch.searchsorted(past.query_positions, positions)
        asked = _queries(heads)[rows]
        end = int(positions[-1]) + 1
        scores = self._mixed(past.calibration, asked, index[:end])
        return scores.expand(len(queries), -1, -1)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Every index key, a share of it for each kv head of the layer."""
        return keys * self.channels * group.itemsize / group.rules.kv_heads

    def _scores(self, maps: dict[str, Tensor], asked: Tensor, held: Tensor) -> Tensor:
        return self._mixed(maps, asked, held @ maps["key"])

    def _mixed(self, maps: Any, asked: Tensor, index: Tensor) -> Tensor:
        """sum_j w_j ReLU(q_j.k) (queries, keys) for queries (queries, layer queries) and index keys
        (keys, channels)."""
        queries = (asked @ maps["query"]).view(len(asked), self.heads, self.channels)
        weights = asked @ maps["weight"] / (self.heads * self.channels) ** 0.5
        scores = torch.zeros(len(asked), len(index), device=asked.device)
        for head in range(self.heads):
            scores = scores + weights[:, head, None] * torch.relu(queries[:, head] @ index.T)
        return scores


def _queries(heads: Sequence[Past]) -> Tensor:
    """The queries of all heads of a layer side by side (queries, layer queries)."""
    return torch.cat([head.queries.movedim(0, 1).flatten(1) for head in heads], dim=-1)


def _keys(heads: Sequence[Past]) -> Tensor:
    """The keys of all kv heads of a layer side by side (keys, layer keys)."""
    return torch.cat([head.keys for head in heads], dim=-1)


def _attention(past: Past, rows: Tensor, seen: Tensor) -> Tensor:
    """Attention of queries, summed over a group (rows, keys)."""
    logits = (past.queries[:, rows] @ past.keys.T).masked_fill(~seen, -torch.inf)
    return logits.softmax(dim=-1).sum(dim=0)
