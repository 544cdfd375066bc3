"""Tiles of queries and keys: sizes, and the loads that all kernels share."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

PRECISION: tl.constexpr = tl.constexpr("tf32x3")
"""float32 goes through the tensor cores in three products, which keep all but its last bit or two;
products of 16-bit numbers are exact in any case."""


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut: queries and keys of a tile, warps of a program, loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, Any]:
        """As a kernel's launch takes them."""
        return {
            "TILE_QUERIES": self.queries,
            "TILE_KEYS": self.keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def width(channels: int) -> int:
    """Channels of a tile: a power of 2, and no fewer than the tensor cores multiply."""
    return max(16, int(triton.next_power_of_2(channels)))


def tiles_for(dtype: torch.dtype, channels: int, tiles: Tiles) -> Tiles:
    """Smaller tiles where elements or channels are larger than what `tiles` is meant for."""
    if dtype.itemsize * width(channels) <= 2 * 128:
        return tiles
    return Tiles(min(tiles.queries, 64), min(tiles.keys, 32), min(tiles.warps, 4), 1)


@triton.jit
def load_rows(base, row, limit, DIM: tl.constexpr, WIDTH: tl.constexpr, CHECKED: tl.constexpr):
    """Rows of a matrix of DIM columns (rows, WIDTH), zeros beyond; CHECKED where `row` may reach
    `limit`."""
    column = tl.arange(0, WIDTH)
    pointers = base + row.to(tl.int64)[:, None] * DIM + column[None, :]
    if CHECKED:
        return tl.load(pointers, mask=(row < limit)[:, None] & (column < DIM)[None, :], other=0.0)
    if DIM != WIDTH:
        return tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def key_tiles(position, first, TILE_KEYS: tl.constexpr):
    """Tiles of keys for queries of these last and first visible keys: (start, full_start, full_end,
    end). All queries see all keys of the full tiles; some see some of the others."""
    end = tl.max(position, 0) // TILE_KEYS + 1
    full_start = tl.minimum(tl.cdiv(tl.max(first, 0), TILE_KEYS), end)
    full_end = tl.maximum((tl.min(position, 0) + 1) // TILE_KEYS, full_start)
    return tl.min(first, 0) // TILE_KEYS, full_start, full_end, end
