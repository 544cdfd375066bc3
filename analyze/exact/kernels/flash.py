"""First pass: attention as FlashAttention computes it, and the maxima of groups of keys."""

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

TILES = Tiles(queries=64, keys=64, warps=4, stages=3)
SPLIT = True
"""Whether weights of 16 bits are multiplied as a sum of two, to keep about float32's precision."""


def flash(inputs: Inputs, turns: int, tiles: Tiles = TILES) -> tuple[Tensor, Tensor, Tensor]:
    """Exact attention and, of every query, the largest product of each group of keys.

    A group's keys are `turns` tiles apart (Tiles.keys * turns keys), since neighbours often score
    alike: key j is of group j mod (Tiles.keys * turns). Tiles are therefore visited in turns, and
    the running maxima of one turn stay in registers.

    FlashAttention-2 (arXiv:2307.08691), Algorithm 1, with online softmax in base 2.

    Returns:
        output (group, queries, value channels) float32, log normalizer (group, queries) float64,
        maxima (group, queries, groups) float32, -inf where a query sees no key of the group.
    """
    group, rows, key_dim = inputs.queries.shape
    value_dim = inputs.values.shape[1]
    tiles = tiles_for(inputs.keys.dtype, max(key_dim, value_dim), tiles)
    output = inputs.queries.new_empty((group, rows, value_dim), dtype=torch.float32)
    log_normalizer = output.new_empty((group, rows), dtype=torch.float64)
    maxima = output.new_empty((group, rows, tiles.keys * turns))
    _flash[group, triton.cdiv(rows, tiles.queries)](
        inputs.queries,
        inputs.keys,
        inputs.values,
        inputs.positions,
        inputs.first,
        output if inputs.sinks is None else inputs.sinks,
        output,
        log_normalizer,
        maxima,
        rows,
        len(inputs.keys),
        inputs.scale,
        inputs.softcap or 0.0,
        KEY_DIM=key_dim,
        KEY_WIDTH=width(key_dim),
        VALUE_DIM=value_dim,
        VALUE_WIDTH=width(value_dim),
        TURNS=turns,
        SINKS=inputs.sinks is not None,
        CAPPED=inputs.softcap is not None,
        SPLIT=SPLIT and inputs.values.dtype.itemsize == 2,
        **tiles.launch,
    )
    return output, log_normalizer, maxima


def plain_flash(inputs: Inputs, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `flash` computes, from all scores at once."""
    products = inputs.products()
    maxima = torch.nn.functional.pad(products, (0, -products.shape[-1] % groups), value=-torch.inf)
    scores = inputs.scores(products.double())
    log_normalizer = torch.logsumexp(scores, dim=-1)
    if inputs.sinks is not None:
        log_normalizer = torch.logaddexp(log_normalizer, inputs.sinks.double()[:, None])
    output = torch.exp(scores - log_normalizer[..., None]).float() @ inputs.values.float()
    return output, log_normalizer, maxima.unflatten(-1, (-1, groups)).amax(dim=-2)


@triton.jit
def _flash(
    queries,
    keys,
    values,
    positions,
    first,
    sinks,
    output,
    log_normalizer,
    maxima,
    rows,
    key_count,
    scale,
    cap,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    TURNS: tl.constexpr,
    SINKS: tl.constexpr,
    CAPPED: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    head = tl.program_id(0)
    # The last queries see the most keys and go first, so that no long program is left at the end.
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
    inside = row < rows
    row = tl.minimum(row, rows - 1)  # Rows past the end repeat the last one and are not written.
    position = tl.load(positions + row)
    oldest = tl.load(first + row)
    place = head.to(tl.int64) * rows + row
    query = load_rows(queries, place, 0, KEY_DIM, KEY_WIDTH, False)
    column = tl.arange(0, TILE_KEYS)
    maximum = maxima + place[:, None] * (TURNS * TILE_KEYS) + column[None, :]
    start, full_start, full_end, end = key_tiles(position, oldest, TILE_KEYS)

    # Low enough for any score, and finite, so that -inf minus it is no NaN.
    largest = tl.full([TILE_QUERIES], -1e30, tl.float32)
    total = tl.zeros([TILE_QUERIES], tl.float32)
    sums = tl.zeros([TILE_QUERIES, VALUE_WIDTH], tl.float32)
    for turn in range(TURNS):
        group = tl.full([TILE_QUERIES, TILE_KEYS], float("-inf"), tl.float32)
        for tile in range(
            full_start + (turn - full_start % TURNS + TURNS) % TURNS, full_end, TURNS
        ):
            key = tile * TILE_KEYS + column
            k = load_rows(keys, key, key_count, KEY_DIM, KEY_WIDTH, False)
            v = load_rows(values, key, key_count, VALUE_DIM, VALUE_WIDTH, False)
            product = tl.dot(query, tl.trans(k), input_precision=PRECISION)
            group = tl.maximum(group, product)
            largest, total, sums = _absorb(
                product, v, largest, total, sums, scale, cap, CAPPED, SPLIT
            )
        tl.store(maximum + turn * TILE_KEYS, group, mask=inside[:, None])
    # What not all queries see comes last and joins the groups where they are stored by now.
    for edge in range(start, end - (full_end - full_start)):
        tile = tl.where(edge < full_start, edge, edge + full_end - full_start)
        key = tile * TILE_KEYS + column
        k = load_rows(keys, key, key_count, KEY_DIM, KEY_WIDTH, True)
        v = load_rows(values, key, key_count, VALUE_DIM, VALUE_WIDTH, True)
        product = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        seen = (key[None, :] <= position[:, None]) & (key[None, :] >= oldest[:, None])
        product = tl.where(seen, product, float("-inf"))
        at = maximum + (tile % TURNS) * TILE_KEYS
        tl.debug_barrier()
        group = tl.load(at, mask=inside[:, None], other=float("-inf"))
        tl.debug_barrier()
        tl.store(at, tl.maximum(group, product), mask=inside[:, None])
        largest, total, sums = _absorb(product, v, largest, total, sums, scale, cap, CAPPED, SPLIT)

    if SINKS:
        sink = tl.load(sinks + head).to(tl.float64) * 1.4426950408889634
        above = tl.maximum(largest, sink.to(tl.float32))
        fade = tl.exp2(largest - above)
        total = total * fade + tl.exp2((sink - above).to(tl.float32))
        sums = sums * fade[:, None]
        largest = above
    # float32 would round the log of a large sum by more than the sum is rounded.
    log_total = largest.to(tl.float64) + tl.log2(total.to(tl.float64))
    tl.store(log_normalizer + place, log_total * 0.6931471805599453, mask=inside)
    channel = tl.arange(0, VALUE_WIDTH)
    tl.store(
        output + place[:, None] * VALUE_DIM + channel[None, :],
        sums / total[:, None],
        mask=inside[:, None] & (channel < VALUE_DIM)[None, :],
    )


@triton.jit
def _absorb(
    product, value, largest, total, sums, scale, cap, CAPPED: tl.constexpr, SPLIT: tl.constexpr
):
    """A tile's share in the softmax; `largest` and scores are in base 2."""
    if CAPPED:
        # tanh(x) = 1 - 2 / (1 + exp(2x)), right at both ends.
        power = tl.exp2(product * (scale / cap * 2.885390081777927))
        score = (1.0 - 2.0 / (1.0 + power)) * (cap * 1.4426950408889634)
        score = tl.where(product == float("-inf"), product, score)
        above = tl.maximum(largest, tl.max(score, 1))
        weight = tl.exp2(score - above[:, None])
    else:
        factor = scale * 1.4426950408889634
        above = tl.maximum(largest, tl.max(product, 1) * factor)
        weight = tl.exp2(product * factor - above[:, None])
    fade = tl.exp2(largest - above)
    total = total * fade + tl.sum(weight, 1)
    sums = sums * fade[:, None]
    narrow = weight.to(value.dtype)
    sums = tl.dot(narrow, value, sums, input_precision=PRECISION)
    if SPLIT:
        rest = (weight - narrow.to(tl.float32)).to(value.dtype)
        sums = tl.dot(rest, value, sums, input_precision=PRECISION)
    return above, total, sums
