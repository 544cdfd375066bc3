"""Candidates from scores that are there: group maxima, bound and selection of a row in one go."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrace.analyze.exact.kernels.bound import BITS, kth_largest
from retrace.analyze.exact.kernels.candidates import plain_reaching

WARPS = 4


def reaching(scores: Tensor, k: int, groups: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Of each row of scores (rows, keys) float32 those that reach the k-th largest maximum of the
    groups `key mod groups`, packed and counted as `candidates` does. -inf is never one of them."""
    rows, keys = scores.shape
    found = scores.new_empty((rows, capacity), dtype=torch.int64)
    counts = scores.new_empty(rows, dtype=torch.int32)
    _reaching[(rows,)](
        scores,
        found,
        counts,
        keys,
        k,
        GROUPS=groups,
        WIDTH=triton.next_power_of_2(groups),
        CAPACITY=capacity,
        BITS=BITS,
        num_warps=WARPS,
    )
    return found, counts


def plain_matrix(scores: Tensor, k: int, groups: int, capacity: int) -> tuple[Tensor, Tensor]:
    """What `reaching` computes with all 32 bits of the bound."""
    maxima = torch.nn.functional.pad(scores, (0, -scores.shape[-1] % groups), value=-torch.inf)
    maxima = maxima.unflatten(-1, (-1, groups)).amax(dim=-2)
    least = maxima.sort(dim=-1, descending=True).values[..., k - 1]
    least = least.clamp(min=torch.finfo(torch.float32).min)
    return plain_reaching(scores, least, capacity)


@triton.jit
def _reaching(
    scores,
    found,
    counts,
    keys,
    k,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scores += row * keys
    found += row * CAPACITY
    group = tl.arange(0, WIDTH)
    maxima = tl.full([WIDTH], float("-inf"), tl.float32)
    for start in range(0, keys, GROUPS):
        inside = (group < GROUPS) & (start + group < keys)
        score = tl.load(scores + start + group, mask=inside, other=float("-inf"))
        maxima = tl.maximum(maxima, score)
    least = kth_largest(maxima, k, BITS)
    count = 0
    for start in range(0, keys, WIDTH):
        key = start + group
        score = tl.load(scores + key, mask=key < keys, other=float("-inf"))
        reach = score >= least
        ones = reach.to(tl.int32)
        slot = count + tl.cumsum(ones, 0) - ones
        bits = score.to(tl.int32, bitcast=True).to(tl.int64) << 32
        tl.store(found + slot, bits | key.to(tl.int64), mask=reach & (slot < CAPACITY))
        count += tl.sum(ones, 0)
    tl.store(counts + row, count)
