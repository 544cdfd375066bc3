"""Positions that are marked, written as lists."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
WARPS = 4


def append_marked(lists: Tensor, starts: Tensor, marks: Tensor) -> None:
    """Write the marked positions of each row of marks (rows, any) bool into lists (rows, listed)
    int64, ascending, from places `starts` (rows,) on; there must be room."""
    if marks.numel():
        with torch.cuda.device_of(lists):
            _append_marked[(len(marks),)](
                lists,
                starts.contiguous(),
                marks.contiguous().view(torch.uint8),
                lists.shape[1],
                marks.shape[1],
                TILE=TILE,
                num_warps=WARPS,
            )


@triton.jit
def _append_marked(lists, starts, marks, listed, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    next_place = tl.load(starts + row)
    for start in range(0, width, TILE):
        position = start + tl.arange(0, TILE)
        inside = position < width
        marked = tl.load(marks + row * width + position, mask=inside, other=0).to(tl.int32)
        place = next_place + tl.cumsum(marked, 0) - marked
        tl.store(lists + row * listed + place, position.to(tl.int64), mask=marked != 0)
        next_place += tl.sum(marked, 0)
