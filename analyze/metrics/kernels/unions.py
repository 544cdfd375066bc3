"""Distinct keys that the heads of a group attend."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrace.analyze.metrics.kernels.lists import Lists

PLACES = 64
"""Places of two lists that are compared together."""
LONGEST = 512
"""Places of a list up to which comparing any two of them is quickest."""
MARKED = 1 << 28
"""Keys that are marked at once."""
WARPS = 1


def unions(lists: Lists, end: int, counts: Tensor) -> None:
    """Count of each head's keys those that no head before it attends at the same budget: their sum
    over the heads is the size of the union.

    Args:
        lists: what is attended.
        end: one past the last key.
        counts: (points, group, queries) int32, to write to.
    """
    group, rows, listed = lists.ids.shape
    if listed > LONGEST:
        step = max(1, MARKED // (end + 1))
        for start in range(0, rows, step):
            _mark(lists, end, slice(start, start + step), counts)
        return
    _unions[rows, group](
        lists.ids,
        lists.attended,
        lists.points,
        counts,
        rows,
        listed,
        len(lists.points),
        *lists.ids.stride()[:2],
        *lists.attended.stride(),
        POINTS=triton.next_power_of_2(len(lists.points)),
        PLACES=PLACES,
        num_warps=WARPS,
    )


def _mark(lists: Lists, end: int, rows: slice, counts: Tensor) -> None:
    """The same for some queries, by marking every key: the cost of a list grows with its length,
    and not with the square of it."""
    ids = lists.ids[:, rows]
    group, queries, listed = ids.shape
    points = len(lists.points)
    places = torch.arange(listed, device=ids.device).expand(queries, -1)
    first_point = ids.new_full((queries, end + 1), points, dtype=torch.int32)
    for head in range(group):
        reach = lists.attended[lists.points, head, rows].T.contiguous()
        start = torch.searchsorted(reach, places, right=True, out_int32=True)
        keys = ids[head].masked_fill(ids[head] < 0, end)
        first_point.scatter_reduce_(-1, keys, start, "amin")
    counts[:, 1:, rows] = 0
    for point in range(points):
        counts[point, 0, rows] = (first_point[:, :end] <= point).sum(dim=-1, dtype=torch.int32)


@triton.jit
def _unions(
    ids,
    attended,
    points,
    counts,
    rows,
    listed,
    point_count,
    ids_head,
    ids_row,
    attended_budget,
    attended_head,
    attended_row,
    POINTS: tl.constexpr,
    PLACES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1).to(tl.int64)
    point = tl.arange(0, POINTS)
    asked = point < point_count
    ids += row * ids_row
    attended += row * attended_row
    # Never falling, so that those past the last reach no less.
    at = tl.load(points + tl.minimum(point, point_count - 1)) * attended_budget
    reach = tl.minimum(tl.load(attended + head * attended_head + at), listed)
    fresh = tl.zeros([POINTS], tl.int32)
    for first in range(0, tl.max(reach), PLACES):
        here = first + tl.arange(0, PLACES)
        key = tl.load(ids + head * ids_head + here, mask=here < listed, other=-1)
        # The first point at which the head attends each, and at which one before it does.
        from_point = tl.sum((reach[:, None] <= here[None, :]).to(tl.int32), 0)
        until = tl.full([PLACES], POINTS, tl.int32)
        for other in range(0, head):
            theirs = tl.minimum(tl.load(attended + other * attended_head + at), listed)
            for second in range(0, tl.max(theirs), PLACES):
                there = second + tl.arange(0, PLACES)
                mask = there < listed
                one = tl.load(ids + other * ids_head + there, mask=mask, other=-2)
                attends = tl.sum((theirs[:, None] <= there[None, :]).to(tl.int32), 0)
                same = key[:, None] == one[None, :]
                until = tl.minimum(until, tl.min(tl.where(same, attends[None, :], POINTS), 1))
        new = (from_point[None, :] <= point[:, None]) & (point[:, None] < until[None, :])
        fresh += tl.sum((new & (key >= 0)[None, :]).to(tl.int32), 1)
    tl.store(counts + (point * heads + head) * rows + row, fresh, mask=asked)
