"""The selection branch of native sparse attention, with means in place of learnt compression."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from retrace.analyze.methods.base import KEEP, ScoreMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.toolkit import key_pools
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class NSA(ScoreMethod):
    """Blocks of consecutive keys, one choice for a group, ranked by the attention that compressed
    keys within a block get: each stands for `kernel` keys, `stride` apart, and counts by the share
    of them that the block holds.

    A compressed key is the mean of its keys here, where NSA learns a network for it, and only the
    branch that selects is replayed. A softmax over the compressed keys is summed over the group,
    which shares one choice. A compressed key is seen once all its keys are there. One block of
    sinks and two of the newest keys are kept, which take at most a quarter and half of the budget,
    so that the published sizes hold from k = 256 on; published are 16 blocks with those, k = 1,024.
    They are counted in keys, where the code's two blocks end with the one being filled.
    """

    source: ClassVar[str] = "arXiv:2502.11089 (NSA), equations 9 and 10"

    block: int = field(default=64, metadata={"help": "keys in a block"})
    kernel: int = field(default=32, metadata={"help": "keys that a compressed key stands for"})
    stride: int = field(default=16, metadata={"help": "keys from one compressed key to the next"})
    keep: Keep = field(
        default=Keep(sink=64, sink_most=0.25, recent=128, recent_most=0.5), metadata=KEEP
    )

    @property
    def unit_size(self) -> int:
        """A block."""
        return self.block

    def build(self, past: Past) -> Any:
        """Compressed keys (pools, channels), and the layer's rules."""
        return key_pools.means(past.keys, self.kernel, self.stride), past.group.rules

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """log of the group's attention to compressed keys within each block (group, queries,
        blocks)."""
        pools, rules = state
        logits = key_pools.logits(queries, pools, positions, rules, self.kernel, self.stride)
        logs = key_pools.group_logs(logits, logits.logsumexp(dim=-1, keepdim=True))
        blocks = int(positions[-1]) // self.block + 1
        within, held = key_pools.in_blocks(logs, blocks, self.block, self.kernel, self.stride)
        within = (within + held.log()).logsumexp(dim=-1)
        return within.clamp(min=key_pools.NOTHING).expand(len(queries), -1, -1)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Every compressed key."""
        return key_pools.complete(keys, self.kernel, self.stride) * group.key_bytes
