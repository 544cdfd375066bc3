"""InfLLM: blocks of keys, found by the few that were attended to most when they were near."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrace.analyze.methods.base import KEEP, POOL, ScoreMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.units.attention import log_normalizer, softcap, visible
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup, scores_at_once

ROWS = 256
"""Queries whose attention is held at once, at the least, of all heads together."""


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
        return self.build_each([past])[0]

    def build_each(self, pasts: Sequence[Past]) -> Sequence[Any]:
        """The states of pasts of one layer's kv heads, of each that end at the same places: queries
        are gone over once for all."""
        ends = sorted({past.end for past in pasts})
        longest = [past for past in pasts if past.end == ends[-1]]
        keys = torch.stack([past.keys for past in longest])
        found = {}
        for end, received in self._received(longest, keys, ends):
            states = self._representatives(keys[:, :end], received)
            # Copies, since a view of one head's would hold on to all.
            for past, state in zip(longest, states, strict=True):
                found[past.group.kv_head, end] = state.clone()
        return [found[past.group.kv_head, past.end] for past in pasts]

    def scores(self, state: Tensor, queries: Tensor, positions: Tensor) -> Tensor:
        """q.r for every block (group, queries, blocks); by the heads' mean for a mean query."""
        if len(queries) < len(state):
            state = state.mean(dim=0, keepdim=True)
        return queries @ state.mT

    def aux_bytes(self, state: Tensor, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """A vector for every block that is seen and every head."""
        blocks = torch.ceil(keys / self.block).clamp(max=state.shape[1])
        return blocks * state.shape[0] * group.key_bytes

    def _representatives(self, keys: Tensor, received: Tensor) -> Tensor:
        """Means of the keys (heads, keys, channels) of each block that received most attention
        (heads, group, keys): (heads, group, blocks, channels)."""
        heads, missing = len(keys), -keys.shape[1] % self.block
        blocks = pad(keys, (0, 0, 0, missing)).view(heads, -1, self.block, keys.shape[2])
        near = pad(received, (0, missing), value=-1).view(heads, received.shape[1], -1, self.block)
        best = near.sort(dim=-1, descending=True, stable=True)
        count = min(self.representatives, self.block)
        ids, there = best.indices[..., :count], best.values[..., :count] >= 0
        head, block = (torch.arange(of, device=ids.device) for of in blocks.shape[:2])
        picked = blocks[head[:, None, None, None], block[:, None], ids]
        means: Tensor = (picked * there[..., None]).sum(dim=-2) / there.sum(dim=-1, keepdim=True)
        return means

    def _received(
        self, pasts: Sequence[Past], keys: Tensor, ends: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Attention (heads, group, keys) that the keys (heads, keys, channels) of some heads have
        received from queries within reach, by each of the ends, ascending."""
        replace(pasts[0], end=ends[0]).asked(slice(None))  # refuses a past without queries
        rules, positions = pasts[0].group.rules, pasts[0].query_positions
        queries = torch.stack([past.queries for past in pasts])
        heads, group = queries.shape[:2]
        sinks = [past.unit.sinks for past in pasts if past.unit.sinks is not None]
        of_sinks = torch.cat(sinks) if sinks else None
        every, at = torch.arange(keys.shape[1], device=keys.device), positions.tolist()
        received = queries.new_zeros(heads, group, keys.shape[1])
        rows = slice(0, 0)
        for end in ends:
            at_once = max(ROWS // heads, scores_at_once(keys.device) // (heads * group * end), 1)
            stop = bisect_left(at, end)
            while rows.stop < stop:
                rows = slice(rows.stop, min(rows.stop + at_once, stop))
                seen = at[rows.stop - 1] + 1
                asked = queries[:, :, rows].flatten(1, 2)
                logits = softcap(asked @ keys[:, :seen].mT, rules).view(heads * group, -1, seen)
                hidden = ~visible(positions[rows], every[:seen], rules)
                logits = logits.masked_fill_(hidden, -torch.inf)
                if of_sinks is None:
                    attention = logits.softmax(dim=-1)
                else:
                    attention = torch.exp(logits - log_normalizer(logits, of_sinks)[..., None])
                if seen > self.local:
                    far = positions[rows, None] - every[:seen] >= self.local
                    attention = attention.masked_fill(far, 0.0)
                received[..., :seen] += attention.sum(dim=1).view(heads, group, seen)
            yield end, received[..., :end]
