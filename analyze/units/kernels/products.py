"""Inner products of single keys, in float64."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrace.analyze.units.kernels.tiles import width

KEYS_TOGETHER = 16
"""Keys whose products a program computes at once."""
WARPS = 4


def products(queries: Tensor, keys: Tensor, ids: Tensor) -> Tensor:
    """q.k (group, queries, any) float64 of queries (group, queries, channels) with those of the
    keys (keys, channels) that `ids` (group, queries, any) int64 name; any number for the id -1."""
    found = torch.empty(ids.shape, dtype=torch.float64, device=ids.device)
    key_dim = keys.shape[1]
    rows = found[..., 0].numel() if found.numel() else 0
    if rows:
        with torch.cuda.device_of(queries):
            _products[(rows,)](
                queries.contiguous(),
                keys.contiguous(),
                ids.contiguous(),
                found,
                ids.shape[-1],
                KEY_DIM=key_dim,
                KEY_WIDTH=width(key_dim),
                TILE=KEYS_TOGETHER,
                num_warps=WARPS,
            )
    return found


def plain_products(queries: Tensor, keys: Tensor, ids: Tensor) -> Tensor:
    """What `products` computes, from all of them."""
    return (queries.double() @ keys.double().T).gather(-1, ids.clamp(min=0))


@triton.jit
def _products(
    queries,
    keys,
    ids,
    found,
    listed,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, KEY_WIDTH)
    there = channel < KEY_DIM
    query = tl.load(queries + row * KEY_DIM + channel, mask=there, other=0.0).to(tl.float64)
    for start in range(0, listed, TILE):
        place = start + tl.arange(0, TILE)
        inside = place < listed
        key = tl.load(ids + row * listed + place, mask=inside, other=0)
        at = tl.maximum(key, 0)[:, None] * KEY_DIM + channel[None, :]
        k = tl.load(keys + at, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float64)
        tl.store(found + row * listed + place, tl.sum(k * query[None, :], 1), mask=inside)
