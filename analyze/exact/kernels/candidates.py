"""Second pass: the keys whose product with a query reaches its bound."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrace.analyze.exact.kernels.inputs import Inputs
from retrace.analyze.units.kernels.tiles import (
    PRECISION,
    Tiles,
    key_tiles,
    load_rows,
    tiles_for,
    width,
)

TILES = Tiles(queries=128, keys=64, warps=8, stages=3)
SLACK = 32
"""Keys that are appended together, and so fit whether or not a list is full with some of them."""


def candidates(
    inputs: Inputs, bound: Tensor, capacity: int, tiles: Tiles = TILES
) -> tuple[Tensor, Tensor]:
    """The visible keys whose product reaches the bound (group, queries) of their query.

    Returns:
        Packed products and keys (group, queries, capacity + SLACK) int64, in no order: the float32
        bits of the product above the key's 32 bits; and how many reach the bound (group, queries)
        int32. Where these are more than `capacity`, some are missing.
    """
    group, rows, key_dim = inputs.queries.shape
    tiles = tiles_for(inputs.keys.dtype, key_dim, tiles)
    found = inputs.queries.new_empty((group, rows, capacity + SLACK), dtype=torch.int64)
    counts = found.new_empty((group, rows), dtype=torch.int32)
    _candidates[group, triton.cdiv(rows, tiles.queries)](
        inputs.queries,
        inputs.keys,
        inputs.positions,
        inputs.first,
        bound,
        found,
        counts,
        rows,
        len(inputs.keys),
        KEY_DIM=key_dim,
        KEY_WIDTH=width(key_dim),
        CAPACITY=capacity,
        LENGTH=capacity + SLACK,
        ASSEMBLY=found.is_cuda,
        **tiles.launch,
    )
    return found, counts


def plain_candidates(inputs: Inputs, bound: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """What `candidates` finds, from all products at once, in ascending order of the keys."""
    return plain_reaching(inputs.products(), bound, capacity + SLACK)


def plain_reaching(scores: Tensor, bound: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Packed scores (..., keys) that reach the bound (...,), in ascending order of the keys, the
    first `length` of them; and how many reach it."""
    missing = max(0, length - scores.shape[-1])
    scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    reach = scores >= bound[..., None]
    bits = scores.contiguous().view(torch.int32).long() << 32
    packed = bits | torch.arange(scores.shape[-1], device=scores.device)
    order = torch.sort(reach.int(), dim=-1, descending=True, stable=True).indices[..., :length]
    return packed.gather(-1, order), reach.sum(dim=-1, dtype=torch.int32)


@triton.jit
def _candidates(
    queries,
    keys,
    positions,
    first,
    bound,
    found,
    counts,
    rows,
    key_count,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    LENGTH: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    head = tl.program_id(0)
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    position = tl.load(positions + row)
    oldest = tl.load(first + row)
    place = head.to(tl.int64) * rows + row
    query = load_rows(queries, place, 0, KEY_DIM, KEY_WIDTH, False)
    # Nothing reaches NaN: rows past the end find nothing.
    least = tl.load(bound + place, mask=inside, other=float("nan"))
    column = tl.arange(0, TILE_KEYS)
    start, full_start, full_end, end = key_tiles(position, oldest, TILE_KEYS)
    found += place * LENGTH
    count = tl.zeros([TILE_QUERIES], tl.int32)
    for tile in range(full_start, full_end):
        k = load_rows(keys, tile * TILE_KEYS + column, key_count, KEY_DIM, KEY_WIDTH, False)
        product = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        count = _append(product, least, tile * TILE_KEYS, found, count, CAPACITY, ASSEMBLY)
    for edge in range(start, end - (full_end - full_start)):
        tile = tl.where(edge < full_start, edge, edge + full_end - full_start)
        key = tile * TILE_KEYS + column
        k = load_rows(keys, key, key_count, KEY_DIM, KEY_WIDTH, True)
        product = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        seen = (key[None, :] <= position[:, None]) & (key[None, :] >= oldest[:, None])
        product = tl.where(seen, product, float("-inf"))
        count = _append(product, least, tile * TILE_KEYS, found, count, CAPACITY, ASSEMBLY)
    tl.store(counts + place, count, mask=inside)


@triton.jit
def _append(
    product, least, first_key, found, count, CAPACITY: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """Add to each row's list what reaches its bound; returns how many are in each by then."""
    keys: tl.constexpr = product.shape[1]
    if keys > 32:
        # A thread's share of a row lies in both halves, so that splitting moves nothing.
        halves = tl.reshape(product, [product.shape[0], 2, keys // 2])
        left, right = tl.split(tl.permute(halves, [0, 2, 1]))
        count = _append(left, least, first_key, found, count, CAPACITY, ASSEMBLY)
        count = _append(right, least, first_key + keys // 2, found, count, CAPACITY, ASSEMBLY)
    else:
        # 32 keys are a bit of one word each: those below a key's own count the ones before it.
        column = tl.arange(0, 32)
        bit = (tl.full([32], 1, tl.uint32) << column.to(tl.uint32))[None, :]
        reach = product >= least[:, None]
        word = tl.sum(tl.where(reach, bit, tl.zeros_like(bit)), 1)
        slot = _ones(word[:, None] & (bit - 1))
        key = first_key + column[None, :]
        # A list that is full takes part no more, but is counted on.
        least = tl.where(count <= CAPACITY, least, float("nan"))
        if ASSEMBLY:
            _write(product, least[:, None], key, slot, (found + count)[:, None])
        else:
            bits = product.to(tl.int32, bitcast=True).to(tl.int64) << 32
            reach = product >= least[:, None]
            tl.store((found + count)[:, None] + slot, bits | key.to(tl.int64), mask=reach)
        count += _ones(word)
    return count


@triton.jit
def _write(product, least, key, slot, found):
    """The store from the registers where the products are: Triton's own would first move all of
    them through shared memory, to where neighbouring threads write neighbouring addresses, of
    which there are none."""
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred kept;
        .reg .b64 at;
        setp.ge.f32 kept, $1, $2;
        mad.wide.s32 at, $4, 8, $5;
        @kept st.global.v2.b32 [at], {$3, $1};
        mov.b32 $0, 0;
        }
        """,
        "=r,f,f,r,r,l",
        [product, least, key, slot, found.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _ones(word):
    """How many bits of a uint32 are set: LLVM knows the idiom as one instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)
