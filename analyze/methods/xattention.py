"""XAttention: blocks by sums of attention over antidiagonals."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import BUDGET, KEEP, BlockMethod
from retrace.analyze.methods.options.budget import Budget
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.toolkit.blocks import logs, split, sums
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class XAttention(BlockMethod):
    """Blocks by the attention among runs of `stride` queries and keys, whose products are summed
    over the antidiagonals of their squares.

    Each run of queries, read backwards, is one vector and each run of keys another: their product,
    over the stride, is the mean of the antidiagonal's. A softmax over the runs so far and sums over
    a block's give its share; the fewest blocks of 128 whose shares reach 0.9 are attended, the
    first and the own among them. Thresholds of their own for heads, which its authors also search,
    are left out.
    """

    source: ClassVar[str] = "arXiv:2503.16428 (XAttention), section 2; mit-han-lab/x-attention"

    stride: int = field(default=8, metadata={"help": "queries and keys in a run"})
    block: int = field(default=128, metadata={"help": "keys in a block"})
    keep: Keep = field(default=Keep(sink=1, recent=1), metadata=KEEP)
    budget: Budget = field(default=Budget("top-p", 0.9), metadata=BUDGET)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % self.stride:
            raise RetraceError(f"block={self.block}: expected a multiple of stride={self.stride}.")

    def build(self, past: Past) -> Tensor:
        """The keys by runs (runs, stride * channels)."""
        return split(past.keys, self.stride).flatten(-2)

    def block_scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """log of each block's share of attention among runs."""
        asked = split(queries, self.stride).flip(-2).flatten(-2)
        first = int(positions[0]) // self.stride
        keys = torch.arange(first + asked.shape[1], device=queries.device)
        logits = asked @ state[: len(keys)].T / self.stride
        own = keys[first:, None]
        shares = logits.masked_fill(keys > own, -torch.inf).softmax(dim=-1)
        return logs(sums(shares.sum(dim=1), self.block // self.stride))

    def operations(self, queries: int, keys: int, group: HeadGroup) -> float:
        """A product of runs for each pair of them: one in `stride` of attention's."""
        return float(queries * keys / self.stride * group.rules.key_dim)
