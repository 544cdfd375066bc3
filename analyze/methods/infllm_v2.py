"""InfLLM-V2: blocks of keys, found by the means of overlapping runs of keys, with no weights."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import KEEP, ScoreMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.toolkit import key_pools
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup

COARSE = 4
"""How many times as long, and as far apart, the pools of a coarse denominator are."""


@dataclass(frozen=True, kw_only=True)
class InfLLMV2(ScoreMethod):
    """Blocks of consecutive keys, one choice for a group, ranked by the most attention that a pool
    gets of those that a block holds a key of: the mean of `kernel` keys, `stride` apart.

    A softmax over the pools is summed over the group, which shares one choice. A pool is seen once
    all its keys are there. One block of sinks and 32 of the newest keys are kept, which take at
    most a quarter and 0.34 of the budget: published are 64 blocks with the sinks besides those 32,
    k = 6,144. They are counted in keys, where the code's window begins with a block. With
    `denominator=coarse` each head's softmax is divided by the sum over pools four times as long and
    as far apart, as in the authors' kernel, which then need not go over all pools twice: heads of a
    group weigh differently, and nothing else changes. Queries that see no such pool take the fine.
    """

    source: ClassVar[str] = "arXiv:2509.24663 (InfLLM-V2), section 3; OpenBMB/infllmv2_cuda_impl"

    block: int = field(default=64, metadata={"help": "keys in a block"})
    kernel: int = field(default=32, metadata={"help": "keys in a pool"})
    stride: int = field(default=16, metadata={"help": "keys from one pool to the next"})
    denominator: str = field(
        default="fine",
        metadata={"help": "pools that the softmax sums over", "choices": ("fine", "coarse")},
    )
    keep: Keep = field(
        default=Keep(sink=64, sink_most=0.25, recent=2048, recent_most=0.34), metadata=KEEP
    )

    @property
    def unit_size(self) -> int:
        """A block."""
        return self.block

    def build(self, past: Past) -> Any:
        """Pools (pools, channels), the coarse ones, and the layer's rules."""
        fine = key_pools.means(past.keys, self.kernel, self.stride)
        coarse = fine[:0]
        if self.denominator == "coarse":
            coarse = key_pools.means(past.keys, COARSE * self.kernel, COARSE * self.stride)
        return fine, coarse, past.group.rules

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """log of the most that the group attends to a pool of each block (group, queries,
        blocks)."""
        pools, coarse, rules = state
        logits = key_pools.logits(queries, pools, positions, rules, self.kernel, self.stride)
        totals = logits.logsumexp(dim=-1, keepdim=True)
        if self.denominator == "coarse":
            sizes = COARSE * self.kernel, COARSE * self.stride
            rough = key_pools.logits(queries, coarse, positions, rules, *sizes)
            rough = rough.logsumexp(dim=-1, keepdim=True)
            totals = torch.where(rough.isneginf(), totals, rough)
        logs = key_pools.group_logs(logits, totals)
        blocks = int(positions[-1]) // self.block + 1
        within, _ = key_pools.in_blocks(logs, blocks, self.block, self.kernel, self.stride)
        best = within.amax(dim=-1).clamp(min=key_pools.NOTHING)
        return best.expand(len(queries), -1, -1)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Every pool, and every coarse one that the denominator is of."""
        pools = key_pools.complete(keys, self.kernel, self.stride)
        if self.denominator == "coarse":
            pools = pools + key_pools.complete(keys, COARSE * self.kernel, COARSE * self.stride)
        return pools * group.key_bytes
