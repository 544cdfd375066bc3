"""FlexPrefill: columns and diagonals or pooled blocks, whichever describes a head."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import BUDGET, KEEP, BlockMethod, Looks
from retrace.analyze.methods.options.budget import Budget
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.toolkit.blocks import logs, means, sums
from retrace.analyze.methods.toolkit.diagonals import columns_and_diagonals
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(BlockMethod):
    """Columns and diagonals of blocks that cover 0.9 of what the prompt's last block of queries
    attends; or, where pooled keys tell that apart well, the pooled blocks that cover it.

    They do where the square root of the Jensen-Shannon divergence between the last block's mean
    query over mean keys and its true mass by block is below `tau`: such a head takes the blocks of
    pooled attention, over all blocks of queries together, that come to 0.9. At least `least` keys'
    columns and diagonals are taken of every head, with the first block and the own. A prompt of so
    few is attended whole.

    The share is `budget=top-p:...`. Where that is more than k keys the best are attended: a block
    is worth its column and its diagonal together, or its pooled attention. Other budgets take the
    best by this alone. Read in chunks, the last block is the chunk's; the published code reads
    whole prompts only.
    """

    source: ClassVar[str] = "arXiv:2502.20766 (FlexPrefill), section 3; bytedance/FlexPrefill"
    looks: ClassVar[Looks] = "end"

    block: int = field(default=128, metadata={"help": "keys in a block"})
    keep: Keep = field(default=Keep(sink=1, recent=1), metadata=KEEP)
    tau: float = field(
        default=0.1, metadata={"help": "divergence below which pooled blocks are taken"}
    )
    least: int = field(default=512, metadata={"help": "keys of columns and of diagonals at least"})
    budget: Budget = field(default=Budget("top-p", 0.9), metadata=BUDGET)

    def build(self, past: Past) -> dict[str, Tensor]:
        """By head: whether it is one of pooled blocks, `pooled` (group,); the `map` of blocks that
        are attended, and their `worth`, both (group, query blocks, key blocks)."""
        size, length = self.block, len(past.keys)
        count = -(-length // size)
        rows = min(size, length)
        columns, diagonals = columns_and_diagonals(past.attention(slice(-rows, None)) / rows)
        keys = means(past.keys, size)
        asked = means(past.queries, size)
        estimate = (past.queries[:, -rows:].mean(dim=1) @ keys.T).softmax(dim=-1)
        column, diagonal = sums(columns, size), sums(diagonals, size)
        pooled = _divergence(estimate, column / column.sum(dim=-1, keepdim=True)) < self.tau
        share = self.budget.amount if self.budget.rule == "top-p" else 1.0
        fewest = min(math.ceil(self.least / size), count)
        taken = [
            _best(
                blocks,
                torch.where(
                    pooled, fewest, (_covering(of, share) // size + 1).clamp(fewest, count)
                ),
            )
            for of, blocks in ((columns, column), (diagonals, diagonal))
        ]
        places = torch.arange(count, device=keys.device)
        seen = places <= places[:, None]
        distance = (places[:, None] - places).clamp(min=0)
        by_lines = taken[0][:, None] | taken[1][:, distance]
        attention = (asked @ keys.T).masked_fill(~seen, -torch.inf).softmax(dim=-1)
        by_pools = by_lines | _within(attention, share * count)
        worth = torch.where(
            pooled[:, None, None], attention, column[:, None] + diagonal[:, distance]
        )
        return {
            "pooled": pooled,
            "map": torch.where(pooled[:, None, None], by_pools, by_lines) & seen,
            "worth": worth.masked_fill(~seen, 0.0),
        }

    def block_scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """log of the larger worth of a block to any of these blocks of queries."""
        return logs(self._rows(state["worth"], positions).amax(dim=1))

    def _rows(self, of: Tensor, positions: Tensor) -> Tensor:
        """Rows of a map (group, rows, key blocks) that queries at these positions are in."""
        end = -(-(int(positions[-1]) + 1) // self.block)
        return of[:, int(positions[0]) // self.block : end, :end]

    def always(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor | None:
        """Everything in a short prompt."""
        count = state["map"].shape[1]
        if count > max(2, math.ceil(self.least / self.block)):
            return None
        units = -(-(int(positions[-1]) + 1) // self.block)
        return torch.ones(1, units, dtype=torch.bool, device=queries.device)

    def choose(self, state: Any, queries: Tensor, positions: Tensor, k: int) -> Tensor | None:
        """What the map has of these blocks of queries, the best within the budget."""
        if self.budget.rule != "top-p":
            return None
        members = self._rows(state["map"], positions).any(dim=1)
        scores = self.block_scores(state, queries, positions)
        # Its own blocks and the first in front, which are attended whatever they are worth.
        own = int(positions[0]) // self.block
        scores[:, own:], scores[:, 0] = torch.inf, torch.inf
        scores = scores.masked_fill(~members, -torch.inf)
        bought = self.units(k, int(positions[-1]) + 1)
        order = scores.argsort(dim=-1, descending=True, stable=True)[:, :bought]
        return order.masked_fill(scores.gather(-1, order).isneginf(), -1)

    def build_operations(self, queries: int, keys: int, group: HeadGroup) -> float:
        """The last block's scores, and pooled attention, which only some heads need."""
        pools = (keys / self.block) * (queries / self.block) / 2
        return (self.block * keys + pools) * group.rules.key_dim


def _covering(shares: Tensor, part: float) -> Tensor:
    """How many of the largest (group, any) it takes to come to more than a part of all."""
    summed = shares.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    return (summed <= part).sum(dim=-1) + 1


def _best(blocks: Tensor, counts: Tensor) -> Tensor:
    """Which blocks (group, blocks) bool are the so many best of each head, the first among them."""
    forced = blocks.clone()
    forced[:, 0] = torch.inf
    order = forced.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(blocks.shape[-1], device=blocks.device)
    return torch.zeros_like(blocks, dtype=torch.bool).scatter(
        -1, order, (places < counts[:, None]).expand_as(order)
    )


def _within(attention: Tensor, total: float) -> Tensor:
    """Which blocks of a map (group, rows, blocks) are the largest that come to no more than a sum
    together."""
    ordered = attention.flatten(1).sort(dim=-1, descending=True, stable=True)
    inside = ordered.values.cumsum(dim=-1) <= total
    marks = torch.zeros_like(inside).scatter(-1, ordered.indices, inside)
    return marks.view_as(attention)


def _divergence(one: Tensor, other: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence between distributions (group, any)."""
    middle = (one + other) / 2
    parts = [torch.xlogy(p, p) - torch.xlogy(p, middle) for p in (one, other)]
    return ((parts[0] + parts[1]).sum(dim=-1) / 2).clamp(min=0).sqrt()
