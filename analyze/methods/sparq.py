"""SparQ Attention: scores from the query's largest channels only."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import KEEP, OUTPUT, POOL, ScoreMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class SparQ(ScoreMethod):
    """Scores keys on the `rank` channels where the group's queries are largest, and puts the mean
    value in place of the attention mass that is left out.

    The softmax of the estimates is tempered by how much of each query's magnitude (L1) the chosen
    channels hold. Estimates are summed over the group, which shares one selection; a quarter of
    the budget goes to the most recent keys. Here the budget includes the query's own key, which
    the published code adds on top, to the recent ones and to the whole: its k = 64 attends 65 keys,
    17 of them recent, where k = 65 here has 16 of them recent and one more found. `output=renorm`
    leaves the mean value out, as the paper does for some models with grouped heads. The local
    quarter is from memory of the published experiments.
    """

    source: ClassVar[str] = "arXiv:2312.04985 (SparQ Attention), section 4, algorithm 1"

    rank: int = field(default=32, metadata={"help": "channels read of every key"})
    pool: str = field(default="sum", metadata=POOL)
    keep: Keep = field(default=Keep(recent_share=0.25), metadata=KEEP)
    output: str = field(default="mean-fill", metadata=OUTPUT)

    def build(self, past: Past) -> Any:
        """The keys, which real systems store a second time by channel."""
        return past.keys

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """q[C].k[C] / sqrt(|q[C]|_1 / |q|_1) over the chosen channels C."""
        magnitude = queries.abs()
        rank = min(self.rank, queries.shape[-1])
        chosen = magnitude.sum(dim=0).topk(rank, dim=-1, sorted=False).indices
        mask = torch.zeros_like(queries[0]).scatter_(-1, chosen, 1.0)
        # A query of zeros scores all keys alike.
        total = magnitude.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        covered = (magnitude * mask).sum(dim=-1, keepdim=True) / total
        # A query with its other channels zero gives the same products as a gather of channels.
        sparse = queries * mask * covered.clamp(min=1e-12).rsqrt()
        scores: Tensor = sparse @ state[: int(positions[-1]) + 1].T
        return scores

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """`rank` channels of every key, and the mean value."""
        rank = min(self.rank, group.rules.key_dim)
        fill = group.value_bytes if self.output == "mean-fill" else 0
        return keys * rank * group.itemsize + fill
