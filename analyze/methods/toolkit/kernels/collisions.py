"""Hash tables in which a query and a key share a bucket, counted."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64
WARPS = 4


def collisions(queries: Tensor, keys: Tensor) -> Tensor:
    """In how many tables (rows, keys) int16 the bucket of each query (rows, tables) int32 is that
    of each key (tables, keys) int32."""
    rows, tables = queries.shape
    count = torch.empty((rows, keys.shape[1]), dtype=torch.int16, device=keys.device)
    if count.numel():
        with torch.cuda.device_of(keys):
            _collisions[(triton.cdiv(rows, TILE), triton.cdiv(keys.shape[1], TILE))](
                queries.T.contiguous(),
                keys.contiguous(),
                count,
                rows,
                keys.shape[1],
                tables,
                TILE=TILE,
                num_warps=WARPS,
            )
    return count


@triton.jit
def _collisions(queries, keys, count, rows, width, tables, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)
    found = tl.zeros([TILE, TILE], tl.int32)
    for table in range(0, tables):
        # No bucket is below 0: what is beyond the last row or key collides with nothing kept.
        one = tl.load(queries + table * rows + row, mask=row < rows, other=-1)
        other = tl.load(keys + table * width + key, mask=key < width, other=-1)
        found += (one[:, None] == other[None, :]).to(tl.int32)
    place = row.to(tl.int64)[:, None] * width + key[None, :]
    inside = (row < rows)[:, None] & (key < width)[None, :]
    tl.store(count + place, found.to(tl.int16), mask=inside)
