"""One list for all budgets where the always-kept keys grow with the budget."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrace.analyze.compiled import compiled
from retrace.analyze.units import kernels

Ids = NDArray[np.int64]
JOINED = 1 << 24
"""Places in lists of all budgets that are looked at together."""


def in_order_of_joining(
    ranked: Tensor, kept: Tensor, sink: int, first_given: Tensor, left: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys in the order in which growing budgets attend them.

    A budget attends its kept keys and the best-ranked others, as many as it has left. What a
    smaller budget attends a larger one does too, if that has as much left or more.

    Args:
        ranked: key ids (group, queries, any), best first, -1 where none is.
        kept: what the largest budget keeps (queries, any): sinks, then the newest first, the
            query's own at place `sink`; -1 where one is gone.
        sink: keys below this position are kept by every budget.
        first_given: the first of the newest keys that each budget keeps (budgets, queries), never
            rising.
        left: keys that each budget has for others (budgets, group or 1, queries or 1).
        positions: of the queries (queries,).

    Returns:
        The list (group, queries, listed), -1 at its end, and how many of its keys each budget
        attends (budgets, group, queries).
    """
    if kernels.usable(ranked):
        from retrace.analyze.selection.kernels.joining import fits, join

        if fits(ranked.shape[-1], kept.shape[-1]):
            return join(ranked, kept, sink, first_given, left)
    if ranked.device.type != "cpu":
        return joined_together(ranked, kept, sink, first_given, left, positions)
    group, queries, _ = ranked.shape
    attended = np.zeros((group, queries, len(first_given)), np.int64)
    ids = np.full((group, queries, ranked.shape[-1] + kept.shape[-1]), -1, np.int64)
    _join(
        *(t.contiguous().numpy() for t in (ranked, kept)),
        sink,
        first_given.T.contiguous().numpy(),
        left.movedim(0, -1).contiguous().numpy(),
        np.full(int(positions[-1]) + 1, -1, np.int64),
        ids,
        attended,
    )
    return torch.from_numpy(ids), torch.from_numpy(attended).movedim(-1, 0)


def joined_together(
    ranked: Tensor, kept: Tensor, sink: int, first_given: Tensor, left: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, of all queries together: every key is sorted by the budget that it joins at."""
    group, queries, _ = ranked.shape
    budgets, places = len(first_given), kept.shape[-1]
    of_kept = _kept_from(kept[None], sink, first_given).expand(group, -1, -1)
    # The place of a ranked key among those that are kept, if it is one of them.
    place = torch.where(ranked < sink, ranked, sink + positions[:, None] - ranked)
    place = place.masked_fill((ranked < 0) | (place >= places), places)
    is_kept = torch.nn.functional.pad(kept, (0, 1), value=-1).expand(group, -1, -1)
    is_kept = (ranked >= 0) & (is_kept.gather(-1, place) == ranked)
    from_kept = _kept_from(ranked, sink, first_given).masked_fill(~is_kept, budgets)
    from_ranked = torch.full_like(ranked, budgets)
    at_once = max(1, JOINED // max(1, ranked.numel()))
    for begin in reversed(range(0, budgets, at_once)):
        stop = min(begin + at_once, budgets)
        these = torch.arange(begin, stop, device=ranked.device)[:, None, None, None]
        other = (ranked >= 0) & (from_kept > these)
        before = other.cumsum(dim=-1, dtype=torch.int32) - other.to(torch.int32)
        joins = other & (before < left[begin:stop, ..., None])
        first = joins.to(torch.uint8).argmax(dim=0) + begin
        from_ranked = torch.where(joins.any(dim=0), first, from_ranked)
    # A key that is in both joins where it comes first.
    sooner = from_ranked < from_kept
    taken = torch.full((group, queries, places + 1), False, device=ranked.device)
    taken.scatter_(-1, place.masked_fill(~(sooner & is_kept), places), True)
    of_kept = of_kept.masked_fill(taken[..., :places], budgets)
    from_ranked = from_ranked.masked_fill(~sooner, budgets)
    start = torch.cat([of_kept, from_ranked], dim=-1)
    keys = torch.cat([kept.expand(group, -1, -1), ranked], dim=-1)
    start, order = start.sort(dim=-1, stable=True)
    listed = keys.gather(-1, order).masked_fill(start == budgets, -1)
    at = torch.arange(budgets, device=ranked.device).repeat(group, queries, 1)
    return listed, torch.searchsorted(start, at, right=True).movedim(-1, 0)


def _kept_from(ids: Tensor, sink: int, first_given: Tensor) -> Tensor:
    """The first budget that keeps each key (any, queries, any); the number of budgets if none."""
    kept = (first_given[:, None, :, None] > ids).sum(dim=0)
    return kept.masked_fill(ids < sink, 0).masked_fill(ids < 0, len(first_given))


@compiled
def _join(
    ranked: Ids,
    kept: Ids,
    sink: int,
    first_given: Ids,
    left: Ids,
    listed_by: Ids,
    ids: Ids,
    attended: Ids,
) -> None:
    group, queries, budgets = attended.shape
    for h in range(group):
        for q in range(queries):
            this, length = h * queries + q, 0
            next_kept, next_ranked, others = 0, 0, 0
            for b in range(budgets):
                while next_kept < kept.shape[1]:
                    key = kept[q, next_kept]
                    if key >= sink and key < first_given[q, b]:
                        break
                    next_kept += 1
                    if key < 0:
                        continue
                    if listed_by[key] == this:
                        others -= 1  # it was one of the best others
                        continue
                    listed_by[key] = this
                    ids[h, q, length] = key
                    length += 1
                room = left[h % left.shape[0], q % left.shape[1], b]
                while others < room and next_ranked < ranked.shape[2]:
                    key = ranked[h, q, next_ranked]
                    next_ranked += 1
                    if key < 0 or listed_by[key] == this:
                        continue
                    listed_by[key] = this
                    ids[h, q, length] = key
                    length += 1
                    others += 1
                attended[h, q, b] = length
