"""The k-th largest maximum: as many scores reach it, each in a group of its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BITS = 20
"""Leading bits of the bound that are found; the others round it down."""
WARPS = 1


def bound(maxima: Tensor, k: int, bits: int = BITS) -> Tensor:
    """The k-th largest of each row of maxima (..., groups) float32, rounded down to its leading
    `bits` bits: (...,) float32.

    Where fewer are finite, the least finite number. Found bit by bit, from the sign on: whether k
    maxima reach the number with the next bit set.
    """
    result = maxima.new_empty(maxima.shape[:-1])
    groups = maxima.shape[-1]
    _bound[(result.numel(),)](
        maxima,
        result,
        k,
        GROUPS=groups,
        WIDTH=triton.next_power_of_2(groups),
        BITS=bits,
        num_warps=WARPS,
    )
    return result


def plain_bound(maxima: Tensor, k: int) -> Tensor:
    """What `bound` computes with all 32 bits, by sorting."""
    largest = maxima.sort(dim=-1, descending=True).values
    return largest[..., k - 1].clamp(min=torch.finfo(torch.float32).min)


@triton.jit
def _bound(maxima, result, k, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, WIDTH)
    value = tl.load(maxima + row * GROUPS + group, mask=group < GROUPS, other=float("-inf"))
    tl.store(result + row, kth_largest(value, k, BITS))


@triton.jit
def kth_largest(value, k, BITS: tl.constexpr):
    """The k-th largest of float32 values, rounded down to its leading BITS bits and no less than
    the least finite number."""
    code = ordered(value)
    least: tl.constexpr = -0x80000000
    reached = tl.where(tl.sum((code >= 0).to(tl.int32), 0) >= k, 0, least)
    for bit in tl.static_range(30, 31 - BITS, -1):
        higher = reached | (1 << bit)
        enough = tl.sum((code >= higher).to(tl.int32), 0) >= k
        reached = tl.where(enough, higher, reached)
    lowest_finite: tl.constexpr = -0x7F800000
    reached = tl.maximum(reached, lowest_finite)
    return (reached ^ ((reached >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def ordered(value):
    """int32 that order as the float32 values do, 0.0 and -0.0 apart."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
