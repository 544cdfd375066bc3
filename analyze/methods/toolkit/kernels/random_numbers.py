"""Random numbers of many places in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
WARPS = 4


def uniform(starts: Tensor, positions: Tensor, count: int) -> Tensor:
    """Uniform numbers (group, queries, count) float32 by a counter's state (group,) int64 for each
    head, hashed on with positions (queries,) int64 and places: those of
    `retrace.analyze.methods.toolkit.random_numbers.plain_uniform`, bit for bit."""
    group, rows = len(starts), len(positions)
    found = torch.empty((group, rows, count), dtype=torch.float32, device=positions.device)
    if found.numel():
        with torch.cuda.device_of(found):
            _uniform[(group * rows, triton.cdiv(count, TILE))](
                starts, positions.contiguous(), found, rows, count, TILE=TILE, num_warps=WARPS
            )
    return found


@triton.jit
def _uniform(starts, positions, found, rows, count, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    start = tl.load(starts + row // rows + one)
    position = tl.load(positions + row % rows + one)
    state = _hashed((start + position).to(tl.uint64, bitcast=True))
    state = _hashed(state + place.to(tl.uint64))
    # The upper 24 bits, and half a step.
    number = ((state >> 40).to(tl.float32) + 0.5) * (1.0 / 16777216.0)
    tl.store(found + row * count + place, number, mask=place < count)


@triton.jit
def _hashed(state):
    """The finalizer of SplitMix64."""
    state = state + 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)
