"""Bytes read of a cache that all heads of a layer share, as those of latent attention do.

There a token's cached vector is read once, whichever heads attend it: what a layer reads is the
distinct keys of all its heads, and no head's share of it can be told from that head alone. Units
are replayed one after another, so that what each reads is noted in a bit for each query and key,
and counted when all heads are done: queries x keys / 16 bytes for each method and budget.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrace.analyze.compiled import compiled
from retrace.analyze.metrics.measure import union_of_heads
from retrace.analyze.metrics.moments import Moments
from retrace.analyze.units.attention import first_visible
from retrace.analyze.units.selection import ALL_READ, Selection
from retrace.analyze.units.unit import Block
from retrace.traces import LayerRules

Bits = NDArray[np.uint8]
Ids = NDArray[np.int64]


class SharedCacheReads:
    """What one method reads in a layer whose heads share a cache, over one sequence's queries."""

    def __init__(
        self, rules: LayerRules, positions: Tensor, topk: Sequence[int], counted: Tensor
    ) -> None:
        """Positions are those of all the sequence's queries (queries,), ascending; `counted` says
        which of them count for each budget of `topk` (budgets, queries) bool."""
        self._rules = rules
        self._topk = tuple(topk)
        self._positions = positions.cpu()
        self._counted = counted
        self._visible = self._positions - first_visible(self._positions, rules) + 1
        row_bytes = (self._positions // 8 + 1).numpy()
        self._starts = np.concatenate([[0], row_bytes.cumsum()[:-1]])
        # Zeros take no memory until they are written.
        self._read = np.zeros((len(self._topk), int(row_bytes.sum())), np.uint8)
        self._own = torch.zeros(self._counted.shape, dtype=torch.float64)

    def add(self, block: Block, selection: Selection, points: Sequence[int]) -> None:
        """Note what the heads of one unit read for a block's queries, at the budgets of the
        selection that `points` name."""
        group, rows = block.unit.group, block.rows
        # The one budget of a plan stands for what each kv head has.
        alone = len(self._topk) == 1
        budgets = [0 if alone else self._topk.index(selection.ks[point]) for point in points]
        listed = (selection.ids >= 0).sum(dim=-1)
        attended = torch.minimum(selection.attended[list(points)], listed)
        positions = self._positions[rows]
        oldest = first_visible(positions, self._rules)
        start, stop = (0, 0) if selection.unread is None else selection.unread
        own = torch.as_tensor(selection.aux_bytes).double().cpu().expand(len(positions))
        if selection.unread is not None:
            read = positions - oldest + 1 - (stop - start)
            own = (own - read * group.key_bytes).clamp(min=0)
        own = own.expand(len(budgets), -1)
        full = float(group.key_bytes + group.value_bytes)
        each = full if selection.attended_bytes is None else selection.attended_bytes
        cached = each == full
        if not cached and (each != group.value_bytes or selection.unread != ALL_READ):
            # Keys and values of the method's own, which no other unit reads.
            own = own + (union_of_heads(block, selection, attended) * each).cpu()
        self._own[budgets, rows] += own
        _note(
            self._read,
            self._starts[rows],
            np.array(budgets),
            selection.ids.cpu().numpy(),
            attended.movedim(0, -1).contiguous().cpu().numpy(),
            cached,
            positions.numpy(),
            oldest.numpy(),
            np.array([start, stop]),
            selection.unread is not None,
        )

    def ratios(self, heads: int) -> Moments:
        """Moments (topk, heads) over the queries that count of the bytes that all heads together
        read over those of the whole cache: the same for each head."""
        assert self._rules.cached_bytes is not None
        counts = np.bitwise_count(self._read)
        entries = np.add.reduceat(counts, self._starts, axis=1, dtype=np.int64)
        read = torch.from_numpy(entries) * self._rules.cached_bytes + self._own
        ratio = read / (self._visible * self._rules.cached_bytes)
        moments = Moments.of(ratio, self._counted)
        parts = (moments.count, moments.mean, moments.squares)
        return Moments(*(np.repeat(part[:, None], heads, axis=1) for part in parts))


@compiled
def _note(
    read: Bits,
    starts: Ids,
    budgets: Ids,
    ids: Ids,
    attended: Ids,
    cached: bool,
    positions: Ids,
    oldest: Ids,
    unread: Ids,
    ranked: bool,
) -> None:
    """Set the bits (budgets, bytes) of the keys that any head attends (group, queries, listed), and
    of the visible ones outside of `unread` if they were `ranked`. A query's bits begin at its byte
    of `starts`."""
    heads, rows, _ = ids.shape
    for q in range(rows):
        for p in range(len(budgets)):
            row = read[budgets[p], starts[q] :]
            if cached:
                for h in range(heads):
                    for place in range(attended[h, q, p]):
                        key = ids[h, q, place]
                        row[key >> 3] |= np.uint8(1 << (key & 7))
            if ranked:
                for key in range(oldest[q], min(unread[0], positions[q] + 1)):
                    row[key >> 3] |= np.uint8(1 << (key & 7))
                for key in range(max(unread[1], oldest[q]), positions[q] + 1):
                    row[key >> 3] |= np.uint8(1 << (key & 7))
