"""The k best of each query's candidates, scores descending, ties to the lower key."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrace.analyze.exact.kernels.bound import ordered

CANDIDATES_PER_WARP = 512


def order(found: Tensor, counts: Tensor, k: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Keys of the k largest of packed candidates (..., length) int64, and their scores: (..., k)
    int64, -1 where there are fewer, and float32, -inf there. Each row has `counts` (...,) int32 of
    them, at most `capacity`, a power of 2.
    """
    ids = found.new_empty((*counts.shape, k))
    scores = torch.empty_like(ids, dtype=torch.float32)
    _order[(counts.numel(),)](
        found,
        counts,
        ids,
        scores,
        RANKS=k,
        CAPACITY=capacity,
        LENGTH=found.shape[-1],
        num_warps=max(1, capacity // CANDIDATES_PER_WARP),
    )
    return ids, scores


def plain_order(found: Tensor, counts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `order` computes, with two stable sorts."""
    listed = torch.arange(found.shape[-1], device=found.device) < counts[..., None]
    keys = torch.where(listed, found & 0xFFFFFFFF, -1)
    scores = (found >> 32).int().view(torch.float32).masked_fill(~listed, -torch.inf)
    by_key = keys.argsort(dim=-1, stable=True)
    scores, keys = scores.gather(-1, by_key), keys.gather(-1, by_key)
    by_score = scores.argsort(dim=-1, stable=True, descending=True)
    return keys.gather(-1, by_score)[..., :k], scores.gather(-1, by_score)[..., :k]


@triton.jit
def _order(
    found,
    counts,
    ids,
    scores,
    RANKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    LENGTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, CAPACITY)
    listed = slot < tl.load(counts + row)
    packed = tl.load(found + row * LENGTH + slot, mask=listed, other=0)
    score = (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 ties with 0.0
    # One number that orders as score and then as the lower key do.
    code = (ordered(score).to(tl.int64) << 32) | (0xFFFFFFFF - (packed & 0xFFFFFFFF))
    least: tl.constexpr = -0x8000000000000000
    code = tl.sort(tl.where(listed, code, least), descending=True)
    key = tl.where(code == least, -1, 0xFFFFFFFF - (code & 0xFFFFFFFF))
    tl.store(ids + row * RANKS + slot, key, mask=slot < RANKS)
    bits = (code >> 32).to(tl.int32)
    score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    score = tl.where(code == least, float("-inf"), score)
    tl.store(scores + row * RANKS + slot, score, mask=slot < RANKS)
