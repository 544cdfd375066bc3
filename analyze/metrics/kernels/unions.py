"""Distinct keys that the heads of a group attend."""

import triton
import triton.language as tl
from torch import Tensor

from retrace.analyze.metrics.kernels.lists import Lists

PLACES = 64
"""Places of two lists that are compared together."""
WARPS = 1


def unions(lists: Lists, counts: Tensor) -> None:
    """Count of each head's keys those that no head before it attends at the same budget: their sum
    over the heads is the size of the union.

    Args:
        lists: what is attended.
        counts: (points, group, queries) int32, to write to.
    """
    group, rows, listed = lists.ids.shape
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
