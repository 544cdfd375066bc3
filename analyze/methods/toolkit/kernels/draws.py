"""The smallest numbers of each row, and what a sample of a row says of all of it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
WARPS = 4
BITS = 31
"""Of a float32 that is not negative, but for the sign."""
MOST_HELD = 1 << 14
"""Numbers of a row that a program holds at once."""
LEAST_HELD = 128
EACH_WARP = 1024
"""Of them in each warp."""


def smallest(numbers: Tensor, counts: Tensor) -> Tensor:
    """Which are the `counts` (rows,) smallest of numbers (rows, any) float32 in [0, inf], ties to
    the earlier: bool (rows, any). An infinite number is never one of them."""
    rows, width = numbers.shape
    marks = torch.empty(numbers.shape, dtype=torch.bool, device=numbers.device)
    if marks.numel():
        held = width <= MOST_HELD
        tile = max(LEAST_HELD, triton.next_power_of_2(width)) if held else TILE
        with torch.cuda.device_of(marks):
            (_smallest_of_held if held else _smallest)[(rows,)](
                numbers.contiguous(),
                counts.to(torch.int32),
                marks.view(torch.uint8),
                width,
                TILE=tile,
                BITS=BITS,
                num_warps=max(1, min(16, tile // EACH_WARP)) if held else WARPS,
            )
    return marks


def sampled_moments(
    logits: Tensor, largest: Tensor, sampled: Tensor, sure: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of weights exp(logit - largest) in float64: the mean of those sampled, the sum of squares
    about it, and the sum of those that are sure, each (rows,) float64.

    Args:
        logits: (rows, keys) float32.
        largest: (rows,) float32, of the logits.
        sampled: bool (rows, keys).
        sure: bool (rows, keys).
    """
    sums = torch.empty((3, len(logits)), dtype=torch.float64, device=logits.device)
    if logits.numel():
        with torch.cuda.device_of(sums):
            _moments[(len(logits),)](
                logits.contiguous(),
                largest.contiguous(),
                sampled.contiguous().view(torch.uint8),
                sure.contiguous().view(torch.uint8),
                sums,
                len(logits),
                logits.shape[1],
                TILE=TILE,
                num_warps=WARPS,
            )
    mean, squares, total = sums
    return mean, squares, total


@triton.jit
def _smallest_of_held(numbers, counts, marks, width, TILE: tl.constexpr, BITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE)
    wanted = tl.load(counts + row)
    code = _code(numbers + row * width, place, width)
    # Numbers that are not negative are in the order of their bits: the largest bits that fewer
    # than `wanted` numbers are below are those of the last one taken.
    bound = wanted * 0
    for bit in range(BITS - 1, -1, -1):
        higher = bound | (1 << bit)
        bound = tl.where(tl.sum((code < higher).to(tl.int32), 0) < wanted, higher, bound)
    tied = (code == bound).to(tl.int32)
    room = wanted - tl.sum((code < bound).to(tl.int32), 0)
    earlier = tl.cumsum(tied, 0) - tied
    taken = (code < bound) | ((tied > 0) & (earlier < room))
    taken = taken & (code < 0x7F800000) & (wanted > 0)  # the code of what is infinite
    tl.store(marks + row * width + place, taken.to(tl.uint8), mask=place < width)


@triton.jit
def _smallest(numbers, counts, marks, width, TILE: tl.constexpr, BITS: tl.constexpr):
    """The same of longer rows, which are read once for every bit."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE)
    wanted = tl.load(counts + row)
    bound = wanted * 0
    for bit in range(BITS - 1, -1, -1):
        higher = bound | (1 << bit)
        below = tl.zeros([TILE], tl.int32)
        for start in range(0, width, TILE):
            code = _code(numbers + row * width, start + place, width)
            below += (code < higher).to(tl.int32)
        bound = tl.where(tl.sum(below, 0) < wanted, higher, bound)
    below = tl.zeros([TILE], tl.int32)
    for start in range(0, width, TILE):
        code = _code(numbers + row * width, start + place, width)
        below += (code < bound).to(tl.int32)
    room = wanted - tl.sum(below, 0)
    for start in range(0, width, TILE):
        code = _code(numbers + row * width, start + place, width)
        tied = (code == bound).to(tl.int32)
        earlier = tl.cumsum(tied, 0) - tied
        taken = (code < bound) | ((tied > 0) & (earlier < room))
        taken = taken & (code < 0x7F800000) & (wanted > 0)
        tl.store(
            marks + row * width + start + place, taken.to(tl.uint8), mask=start + place < width
        )
        room -= tl.sum(tied, 0)


@triton.jit
def _code(numbers, place, width):
    number = tl.load(numbers + place, mask=place < width, other=float("inf"))
    return number.to(tl.int32, bitcast=True)


@triton.jit
def _moments(logits, largest, sampled, sure, sums, rows, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE)
    most = tl.load(largest + row)
    count = tl.zeros([TILE], tl.int32)
    first = tl.zeros([TILE], tl.float64)
    total = tl.zeros([TILE], tl.float64)
    for start in range(0, width, TILE):
        at = row * width + start + place
        inside = start + place < width
        logit = tl.load(logits + at, mask=inside, other=float("-inf"))
        weight = tl.exp((logit - most).to(tl.float64))
        one = tl.load(sampled + at, mask=inside, other=0) != 0
        count += one.to(tl.int32)
        first += tl.where(one, weight, 0.0)
        total += tl.where(tl.load(sure + at, mask=inside, other=0) != 0, weight, 0.0)
    mean = tl.sum(first, 0) / tl.maximum(tl.sum(count, 0), 1).to(tl.float64)
    squares = tl.zeros([TILE], tl.float64)
    for start in range(0, width, TILE):
        at = row * width + start + place
        inside = start + place < width
        logit = tl.load(logits + at, mask=inside, other=float("-inf"))
        off = tl.exp((logit - most).to(tl.float64)) - mean
        one = tl.load(sampled + at, mask=inside, other=0) != 0
        squares += tl.where(one, off * off, 0.0)
    tl.store(sums + row, mean)
    tl.store(sums + rows + row, tl.sum(squares, 0))
    tl.store(sums + 2 * rows + row, tl.sum(total, 0))
