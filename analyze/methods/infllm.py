"""InfLLM: blocks of keys, found by the few that were attended to most when they were near."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import KEEP, POOL, ScoreMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.toolkit import pages
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class InfLLM(ScoreMethod):
    """Blocks of consecutive keys, ranked by the query's product with the mean of a block's
    `representatives`: the keys that queries up to `local` positions later attended to most.

    Each query head has representatives of its own, and all heads of the layer choose together, by
    the sum of their products, as the code concatenates heads. The first 128 and the last 4,096 keys
    are kept, and take at most a fiftieth and 65 % of the budget: the published 16 blocks with all
    that is kept are k = 6,400. Later keys are attended until blocks are made anew. The code turns
    all distant keys to one relative position, for contexts longer than the model was trained on;
    here they are where they were.
    """

    source: ClassVar[str] = "arXiv:2402.04617 (InfLLM), section 3; thunlp/InfLLM"
    fitted: ClassVar[bool] = True
    keeps_new: ClassVar[bool] = True

    block: int = field(default=128, metadata={"help": "keys in a block"})
    representatives: int = field(default=4, metadata={"help": "keys that stand for a block"})
    local: int = field(default=4096, metadata={"help": "how far queries judge a key from"})
    pool: str = field(default="layer-sum", metadata=POOL)
    keep: Keep = field(
        default=Keep(sink=128, sink_most=0.02, recent=4096, recent_most=0.65), metadata=KEEP
    )

    @property
    def unit_size(self) -> int:
        """A block."""
        return self.block

    def build(self, past: Past) -> Any:
        """Means of the representatives (group, blocks, channels)."""
        near = torch.nn.functional.pad(self._received(past), (0, -past.end % self.block), value=-1)
        near = near.view(len(near), -1, self.block)
        count = min(self.representatives, self.block)
        chosen = near.sort(dim=-1, descending=True, stable=True)
        ids, there = chosen.indices[..., :count], chosen.values[..., :count] >= 0
        keys = pages.split(past.keys, self.block)
        picked = keys[torch.arange(len(keys), device=ids.device)[:, None], ids]
        return (picked * there[..., None]).sum(dim=-2) / there.sum(dim=-1, keepdim=True)

    def scores(self, state: Tensor, queries: Tensor, positions: Tensor) -> Tensor:
        """q.r for every block (group, queries, blocks); by the heads' mean for a mean query."""
        if len(queries) < len(state):
            state = state.mean(dim=0, keepdim=True)
        return queries @ state.mT

    def aux_bytes(self, state: Tensor, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """A vector for every block that is seen and every head."""
        blocks = torch.ceil(keys / self.block).clamp(max=state.shape[1])
        return blocks * state.shape[0] * group.key_bytes

    def _received(self, past: Past) -> Tensor:
        """Attention (group, keys) that each key received from queries within reach."""
        keys = torch.arange(past.end, device=past.keys.device)
        received = torch.zeros(past.group.rules.group, past.end, device=past.keys.device)
        past.asked(slice(None))  # refuses a past without queries
        for rows in torch.split(torch.arange(len(past.query_positions)), 256):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            far = past.query_positions[part][:, None] - keys >= self.local
            received += past.attention(part).masked_fill(far, 0.0).sum(dim=1)
        return received
