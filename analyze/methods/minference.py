"""MInference: a pattern for each head, and where its lines are by the prompt's last queries."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import BUDGET, BlockMethod, LearnedLike, Looks
from retrace.analyze.methods.options.budget import Budget
from retrace.analyze.methods.toolkit.blocks import means
from retrace.analyze.methods.toolkit.diagonals import columns_and_diagonals, keys_on_diagonals
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules, RetraceError

A_SHAPE, VERTICAL_SLASH, BLOCK = "a-shape", "vertical-slash", "block"
SEARCH = "search"
SEARCHED = (
    (A_SHAPE, 100 / 900),
    (VERTICAL_SLASH, 30 / 830),
    (VERTICAL_SLASH, 100 / 850),
    (VERTICAL_SLASH, 1000 / 7096),
    (VERTICAL_SLASH, 500 / 1200),
    (VERTICAL_SLASH, 3500 / 3600),
    (BLOCK, 0.0),
)
"""Patterns that are tried for a head, with the share of the budget that sinks or columns take: the
sizes that the search of the published code tries, and the one that it falls back to."""
FIRST_COLUMNS, FIRST_DIAGONALS = 30, 100
"""Columns from the first and distances from 0 on that come before all others."""
TRIED_BLOCKS = 8
"""Blocks of queries of a sequence, in its second half, that patterns are compared on."""
LEFT_OUT = 1 << 40
"""The rank of a key that a pattern leaves out."""


@dataclass(frozen=True, kw_only=True)
class MInference(BlockMethod):
    """Columns and diagonals for all queries by what the prompt's last 64 attend; for some heads
    blocks by mean queries and keys, or sinks and recent keys.

    Of a vertical-slash head the columns of largest attention are attended, the first 30 among them,
    and the diagonals, the first 100 among them: a block of queries attends the same keys for all of
    its diagonals, so that each is as wide as the block. Columns take `columns` of the budget, and
    the best diagonals as many keys as are left, those of 1,000 and 6,096 by default, which is what
    the published configuration of Llama-3.1-8B has for nearly all heads.

    Which pattern a head has is searched on calibration sequences: that of the most attention mass
    at a budget of `tried` keys, with the sizes that the published search tries; the fallback to
    vertical-slash that its code takes for the others is left out. `pattern=vertical-slash`, and the
    others, are for all heads, and nothing is learnt. Read in chunks, the last queries are the
    chunk's. Published for blocks of 64 queries.
    """

    source: ClassVar[str] = "arXiv:2407.02490 (MInference), section 3; microsoft/MInference"
    looks: ClassVar[Looks] = "end"

    pattern: str = field(
        default=SEARCH,
        metadata={
            "help": "of all heads, or searched for each",
            "choices": (SEARCH, A_SHAPE, VERTICAL_SLASH, BLOCK),
        },
    )
    last: int = field(default=64, metadata={"help": "last queries that show columns and diagonals"})
    columns: float = field(
        default=0.141,
        metadata={"help": "share of the budget that columns take, where no pattern is searched"},
    )
    tried: int = field(default=512, metadata={"help": "keys while patterns are compared"})
    budget: Budget = field(default=Budget(), metadata=BUDGET)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.columns <= 1:
            raise RetraceError(f"columns={self.columns}: expected a share, 0 to 1.")
        if self.budget.by_estimate:
            raise RetraceError(
                f"budget={self.budget}: lines have no scores; expected k or fraction."
            )

    @property
    def calibrated(self) -> bool:
        """Where patterns are searched."""
        return self.pattern == SEARCH

    @property
    def unit_size(self) -> int:
        """Single keys, of which lines are made."""
        return 1

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """Which of `SEARCHED` each head has, `pattern` (group,) int64."""
        with torch.no_grad():
            held = sum(self._held(past) for past in pasts)
        assert isinstance(held, Tensor)
        # NumPy's argmax leaves ties to the first.
        return {"pattern": torch.from_numpy(held.cpu().numpy().argmax(axis=0))}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        return {"pattern": (torch.int64, (rules.group,))}

    def _held(self, past: Past) -> Tensor:
        """Mean attention mass that each pattern of `SEARCHED` holds (patterns, group)."""
        state = self._seen(past)
        length, size = len(past.query_positions), self.block
        starts = sorted(
            {length // 2 + i * length // (2 * TRIED_BLOCKS) for i in range(TRIED_BLOCKS)}
        )
        held = past.keys.new_zeros(len(SEARCHED), past.group.rules.group, dtype=torch.float64)
        for start in starts:
            rows = slice(start, min(start + size, length))
            positions = past.query_positions[rows]
            mass = past.attention(rows)[..., : int(positions[-1]) + 1].mean(dim=1).double()
            for i, (pattern, share) in enumerate(SEARCHED):
                rank = self._ranked(
                    pattern, share, state, past.queries[:, rows], positions, self.tried
                )
                # Keys that only later queries of the block see hold what those attend to.
                held[i] += (mass * (rank < LEFT_OUT)).sum(dim=-1)
        return held / len(starts)

    def build(self, past: Past) -> dict[str, Tensor]:
        """Means of blocks of keys, ranks of columns and diagonals, and each head's pattern."""
        state = self._seen(past)
        if self.pattern == SEARCH:
            state["pattern"] = past.calibration["pattern"]
        return state

    def _seen(self, past: Past) -> dict[str, Tensor]:
        """What the last queries show: `columns` and `diagonals` (group, keys), 0 for the best of
        each; and `means` (blocks, channels) of keys."""
        last = past.attention(slice(-min(self.last, len(past.query_positions)), None))
        columns, diagonals = columns_and_diagonals(last)
        columns[:, :FIRST_COLUMNS] = torch.inf
        diagonals[:, :FIRST_DIAGONALS] = torch.inf
        return {
            "columns": _ranks(columns),
            "diagonals": _ranks(diagonals),
            "means": means(past.keys, self.block),
        }

    def choose(self, state: Any, queries: Tensor, positions: Tensor, k: int) -> Tensor:
        """The keys of each head's pattern."""
        end = int(positions[-1]) + 1
        within = int(self.budget.most(torch.tensor([[[k]]]), torch.tensor([end])))
        if within >= end:
            return torch.arange(end, device=queries.device).expand(len(queries), -1)
        if "pattern" in state:
            asked = [SEARCHED[i] for i in state["pattern"].tolist()]
        else:
            share = 100 / 900 if self.pattern == A_SHAPE else self.columns
            asked = [(self.pattern, share)] * len(queries)
        ranks = torch.empty(len(queries), end, dtype=torch.int64, device=queries.device)
        for pattern, share in dict.fromkeys(asked):
            heads = [i for i, own in enumerate(asked) if own == (pattern, share)]
            of = {name: part[heads] if name in LINES else part for name, part in state.items()}
            ranks[heads] = self._ranked(
                pattern, share, of, queries[heads], positions, max(1, within)
            )
        order = ranks.argsort(dim=-1, stable=True)
        chosen = order.masked_fill(ranks.gather(-1, order) == LEFT_OUT, -1)
        return chosen[:, : max(1, int((chosen >= 0).sum(dim=-1).max()))]

    def _ranked(
        self,
        pattern: str,
        share: float,
        state: dict[str, Tensor],
        queries: Tensor,
        positions: Tensor,
        k: int,
    ) -> Tensor:
        """The rank of each key up to the block's end by a pattern (group, keys) int64, those of
        equal rank in ascending order; `LEFT_OUT` for what is."""
        end, rows = int(positions[-1]) + 1, queries.shape[1]
        keys = torch.arange(end, device=queries.device)
        if pattern == A_SHAPE:
            first = round(share * k)
            from_end = end - 1 - keys
            ranks = torch.where(keys < first, keys, first + from_end)
            held = (keys < first) | (from_end < k - first)
            return ranks.masked_fill(~held, LEFT_OUT).expand(len(queries), -1)
        if pattern == BLOCK:
            blocks = queries.mean(dim=1) @ state["means"][: -(-end // self.block)].T
            ranks = _ranks(blocks)
            ranks = ranks.masked_fill(ranks >= max(1, k // self.block), LEFT_OUT)
            return ranks[:, keys // self.block]
        count = round(share * k)
        columns = state["columns"][:, :end]
        columns = columns.masked_fill(columns >= count, LEFT_OUT)
        along = keys_on_diagonals(state["diagonals"], rows, end)
        # A diagonal is taken whole or not: the first one that there is no room for ends them.
        ordered = along.sort(dim=-1).values
        room = min(k - count, end)
        limit = ordered[:, room : room + 1] if room < end else ordered[:, -1:] + 1
        along = (count + along).masked_fill(along >= limit, LEFT_OUT)
        return torch.minimum(columns, along)

    def operations(self, queries: int, keys: int, group: HeadGroup) -> float:
        """A product of means for each block of keys, where blocks are the pattern; a head that is
        searched may have it."""
        if self.pattern not in (SEARCH, BLOCK):
            return 0.0
        return float(keys / self.block * group.rules.key_dim)

    def build_operations(self, queries: int, keys: int, group: HeadGroup) -> float:
        """The scores of the last queries, where columns and diagonals are the pattern."""
        if self.pattern not in (SEARCH, VERTICAL_SLASH):
            return 0.0
        return float(min(self.last, queries) * keys * group.rules.key_dim)


LINES = ("columns", "diagonals")
"""What of a state has heads."""


def _ranks(values: Tensor) -> Tensor:
    """The rank of each value of the last axis, 0 for the largest, ties to the first."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(values.shape[-1], device=values.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, places)
