"""One list for all budgets, of each query by a program of its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

COMPARED = 1 << 14
"""Pairs of a ranked and a kept key that a program can compare at once."""
WARPS = 1


def fits(ranked: int, kept: int) -> bool:
    """Whether lists of so many keys can be joined here."""
    compared: int = triton.next_power_of_2(ranked) * triton.next_power_of_2(kept)
    return compared <= COMPARED


def join(
    ranked: Tensor, kept: Tensor, sink: int, first_given: Tensor, left: Tensor
) -> tuple[Tensor, Tensor]:
    """`in_order_of_joining` on a GPU, of tensors as it takes them."""
    group, queries, best = ranked.shape
    budgets, places = len(first_given), kept.shape[-1]
    ids = ranked.new_full((group, queries, best + places), -1)
    attended = ranked.new_empty((budgets, group, queries))
    left = left.expand(budgets, group, queries)
    with torch.cuda.device_of(ranked):
        _join[queries, group](
            ranked.contiguous(),
            kept.contiguous(),
            sink,
            first_given.contiguous(),
            left,
            ids,
            attended,
            queries,
            best,
            places,
            budgets,
            *left.stride(),
            BEST=triton.next_power_of_2(best),
            PLACES=triton.next_power_of_2(places),
            num_warps=WARPS,
        )
    return ids, attended


@triton.jit
def _join(
    ranked,
    kept,
    sink,
    first_given,
    left,
    ids,
    attended,
    queries,
    best,
    places,
    budgets,
    left_budget,
    left_head,
    left_row,
    BEST: tl.constexpr,
    PLACES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1).to(tl.int64)
    rank = tl.arange(0, BEST)
    place = tl.arange(0, PLACES)
    one = tl.load(ranked + (head * queries + row) * best + rank, mask=rank < best, other=-1)
    own = tl.load(kept + row * places + place, mask=place < places, other=-1)
    same = (one[:, None] == own[None, :]) & (one >= 0)[:, None]
    is_kept = tl.max(same.to(tl.int32), 1) > 0
    # The first budget at which each joins, as one of the best others and as one that is kept.
    as_other = tl.zeros([BEST], tl.int32) + budgets
    as_kept = tl.zeros([PLACES], tl.int32) + budgets
    for budget in range(0, budgets):
        since = tl.load(first_given + budget * queries + row)
        room = tl.load(left + budget * left_budget + head * left_head + row * left_row)
        keeps = (own >= 0) & ((own < sink) | (own >= since))
        as_kept = tl.where(keeps, tl.minimum(as_kept, budget), as_kept)
        other = (one >= 0) & ((is_kept == 0) | ((one >= sink) & (one < since)))
        ones = other.to(tl.int32)
        before = tl.cumsum(ones, 0) - ones
        as_other = tl.where(other & (before < room), tl.minimum(as_other, budget), as_other)
    # A key that is in both joins where it comes first.
    theirs = tl.min(tl.where(same, as_kept[None, :], budgets), 1)
    ours = tl.min(tl.where(same, as_other[:, None], budgets), 0)
    as_other = tl.where(as_other < theirs, as_other, budgets)
    as_kept = tl.where(ours < as_kept, budgets, as_kept)
    ids += (head * queries + row) * (best + places)
    length = 0
    for budget in range(0, budgets):
        for_kept = (as_kept == budget).to(tl.int32)
        at = length + tl.cumsum(for_kept, 0) - for_kept
        tl.store(ids + at, own, mask=for_kept > 0)
        length += tl.sum(for_kept)
        for_other = (as_other == budget).to(tl.int32)
        at = length + tl.cumsum(for_other, 0) - for_other
        tl.store(ids + at, one, mask=for_other > 0)
        length += tl.sum(for_other)
        tl.store(attended + (budget * heads + head) * queries + row, length.to(tl.int64))
