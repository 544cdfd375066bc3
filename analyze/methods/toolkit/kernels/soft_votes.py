"""The chance that a query's soft hashes give to the buckets of a key."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrace.analyze.units.kernels.tiles import PRECISION, width

TILE = 64
WARPS = 4


def soft_votes(soft: Tensor, total: Tensor, corners: Tensor, positions: Tensor) -> Tensor:
    """The sum over tables of exp(h.c - total) (group, queries, keys) float32, of a query's h and
    a key's corner c; 0 for tiles of keys that come after all queries of a tile.

    Args:
        soft: h (tables, group, queries, bits) float32.
        total: (tables, group, queries) float32.
        corners: c (tables, keys, bits) float32, of 1 and -1.
        positions: (queries,) int64, ascending.
    """
    tables, group, rows, bits = soft.shape
    keys = corners.shape[1]
    votes = torch.empty((group, rows, keys), dtype=torch.float32, device=soft.device)
    if votes.numel():
        with torch.cuda.device_of(votes):
            _soft_votes[(triton.cdiv(rows, TILE), triton.cdiv(keys, TILE), group)](
                soft.contiguous(),
                total.contiguous(),
                corners.contiguous(),
                positions.contiguous(),
                votes,
                group,
                rows,
                keys,
                tables,
                BITS=bits,
                WIDTH=width(bits),
                TILE=TILE,
                num_warps=WARPS,
            )
    return votes


@triton.jit
def _soft_votes(
    soft,
    total,
    corners,
    positions,
    votes,
    group,
    rows,
    keys,
    tables,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)
    bit = tl.arange(0, WIDTH)
    there, known = row < rows, key < keys
    found = tl.zeros([TILE, TILE], tl.float32)
    last = tl.max(tl.load(positions + row, mask=there, other=0), 0)
    if tl.program_id(1) * TILE <= last:
        for table in range(0, tables):
            own = (table * group + head) * rows + row
            h = tl.load(
                soft + own[:, None] * BITS + bit[None, :],
                mask=there[:, None] & (bit < BITS)[None, :],
                other=0.0,
            )
            c = tl.load(
                corners + (table * keys + key)[None, :] * BITS + bit[:, None],
                mask=known[None, :] & (bit < BITS)[:, None],
                other=0.0,
            )
            log_total = tl.load(total + own, mask=there, other=0.0)
            dots = tl.dot(h, c, input_precision=PRECISION)
            found += tl.exp(dots - log_total[:, None])
    place = (head * rows + row)[:, None] * keys + key[None, :]
    tl.store(votes + place, found, mask=there[:, None] & known[None, :])
