"""Sums over the queries of a block: moments, bucket by bucket too, and histograms."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrace.analyze.metrics.histogram import BINS, FIRST_BIN, SHIFT

ROWS = 1024
"""Queries that a program sums at once."""
BUCKETED_ROWS = 128
WARPS = 4
NONE = torch.iinfo(torch.int64).max


def moments(
    values: Tensor, positions: Tensor, first: Tensor, limits: Tensor
) -> tuple[Tensor, Tensor]:
    """Count, mean and sum of squared deviations of each stream, over the queries that count.

    Args:
        values: (streams, queries) float32; NaN is never counted.
        positions: (queries,) int64.
        first: the position from which queries count (streams,) int64.
        limits: the largest number that can be (streams,) float32; less than 0, it is the negative
            of that, and NaN can be as well.

    Returns:
        (streams, 3) float64; and the place in `values` of the first number that cannot be, `NONE`
        if there is none, (1,) int64.
    """
    summed = values.new_empty((len(values), 3), dtype=torch.float64)
    wrong = torch.full((1,), NONE, device=values.device)
    _moments[(len(values),)](
        values, positions, first, limits, summed, wrong, values.shape[1], ROWS=ROWS, num_warps=WARPS
    )
    return summed, wrong


def bucketed(
    values: Tensor, streams: Tensor, positions: Tensor, first: Tensor, buckets: Tensor, size: int
) -> Tensor:
    """The same of each bucket's queries, (axes, streams, size, 3) float64.

    Args:
        values: (any, queries) float32.
        streams: which of them (streams,) int64.
        positions: (queries,) int64.
        first: (any,) int64, as for `moments`.
        buckets: the bucket of each query (axes, queries) int64.
        size: how many there are.
    """
    summed = values.new_empty((len(buckets), len(streams), size, 3), dtype=torch.float64)
    _bucketed[len(streams), len(buckets)](
        values,
        streams,
        positions,
        first,
        buckets.contiguous(),  # which some of a block's queries are not
        summed,
        values.shape[1],
        size,
        ROWS=BUCKETED_ROWS,
        SIZE=triton.next_power_of_2(size),
        num_warps=WARPS,
    )
    return summed


def histogram(values: Tensor, positions: Tensor, first: Tensor) -> Tensor:
    """How many numbers (streams, queries) float32 that count are in each bin (streams, bins) int32,
    as `Histogram` has them."""
    counts = torch.zeros((len(values), BINS), dtype=torch.int32, device=values.device)
    rows = values.shape[1]
    _histogram[len(values), triton.cdiv(rows, ROWS)](
        values,
        positions,
        first,
        counts,
        rows,
        BINS=BINS,
        FIRST_BIN=FIRST_BIN,
        SHIFT=SHIFT,
        ROWS=ROWS,
        num_warps=WARPS,
    )
    return counts


@triton.jit
def _counted(values, positions, start, stream, first_row, rows, ROWS: tl.constexpr):
    """Numbers of some queries, and which of the queries count."""
    row = first_row + tl.arange(0, ROWS)
    inside = row < rows
    value = tl.load(values + stream * rows + row, mask=inside, other=0.0)
    return value, inside & (tl.load(positions + row, mask=inside, other=-1) >= start)


@triton.jit
def _moments(values, positions, first, limits, summed, wrong, rows, ROWS: tl.constexpr):
    stream = tl.program_id(0).to(tl.int64)
    start = tl.load(first + stream)
    limit = tl.zeros([ROWS], tl.float32) + tl.load(limits + stream)
    none: tl.constexpr = 9223372036854775807
    earliest = tl.full([], none, tl.int64)
    count = tl.zeros([ROWS], tl.float64)
    total = tl.zeros([ROWS], tl.float64)
    for first_row in range(0, rows, ROWS):
        value, counts = _counted(values, positions, start, stream, first_row, rows, ROWS)
        known = counts & (value == value)
        count += known.to(tl.float64)
        total += tl.where(known, value, 0.0).to(tl.float64)
        can_be = (value >= 0.0) & (value <= tl.abs(limit))
        missing = (value != value) & (limit < 0.0)
        bad = counts & (can_be == 0) & (missing == 0)
        at = stream * rows + first_row + tl.arange(0, ROWS)
        earliest = tl.minimum(earliest, tl.min(tl.where(bad, at, none)))
    number = tl.sum(count)
    mean = tl.sum(total) / tl.maximum(number, 1.0)
    squares = tl.zeros([ROWS], tl.float64)
    for first_row in range(0, rows, ROWS):
        value, counts = _counted(values, positions, start, stream, first_row, rows, ROWS)
        known = counts & (value == value)
        apart = tl.where(known, value.to(tl.float64) - mean, 0.0)
        squares += apart * apart
    tl.store(summed + stream * 3, number)
    tl.store(summed + stream * 3 + 1, mean)
    tl.store(summed + stream * 3 + 2, tl.sum(squares))
    if earliest < none:
        tl.atomic_min(wrong, earliest)


@triton.jit
def _bucketed(
    values,
    streams,
    positions,
    first,
    buckets,
    summed,
    rows,
    size,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    axis = tl.program_id(1).to(tl.int64)
    stream = tl.load(streams + at)
    start = tl.load(first + stream)
    bucket = tl.arange(0, SIZE)
    count = tl.zeros([SIZE], tl.float64)
    total = tl.zeros([SIZE], tl.float64)
    for first_row in range(0, rows, ROWS):
        value, counts = _counted(values, positions, start, stream, first_row, rows, ROWS)
        row = first_row + tl.arange(0, ROWS)
        theirs = tl.load(buckets + axis * rows + row, mask=row < rows, other=-1)
        inside = (theirs[None, :] == bucket[:, None]) & (counts & (value == value))[None, :]
        count += tl.sum(inside.to(tl.float64), 1)
        total += tl.sum(tl.where(inside, value[None, :].to(tl.float64), 0.0), 1)
    mean = total / tl.maximum(count, 1.0)
    squares = tl.zeros([SIZE], tl.float64)
    for first_row in range(0, rows, ROWS):
        value, counts = _counted(values, positions, start, stream, first_row, rows, ROWS)
        row = first_row + tl.arange(0, ROWS)
        theirs = tl.load(buckets + axis * rows + row, mask=row < rows, other=-1)
        inside = (theirs[None, :] == bucket[:, None]) & (counts & (value == value))[None, :]
        apart = tl.where(inside, value[None, :].to(tl.float64) - mean[:, None], 0.0)
        squares += tl.sum(apart * apart, 1)
    to = summed + ((axis * tl.num_programs(0) + at) * size + bucket) * 3
    tl.store(to, count, mask=bucket < size)
    tl.store(to + 1, mean, mask=bucket < size)
    tl.store(to + 2, squares, mask=bucket < size)


@triton.jit
def _histogram(
    values,
    positions,
    first,
    counts,
    rows,
    BINS: tl.constexpr,
    FIRST_BIN: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
):
    stream = tl.program_id(0).to(tl.int64)
    start = tl.load(first + stream)
    first_row = tl.program_id(1) * ROWS
    value, counts_here = _counted(values, positions, start, stream, first_row, rows, ROWS)
    place = (value.to(tl.int32, bitcast=True) >> SHIFT) - FIRST_BIN + 1
    place = tl.minimum(tl.maximum(place, 0), BINS - 1)
    tl.atomic_add(counts + stream * BINS + place, 1, mask=counts_here & (value == value))
