"""The exact pass over a block: flash, bound, candidates, order, and what their lists can't hold."""

from dataclasses import replace

import torch
from torch import Tensor

from retrace.analyze.exact.kernels.bound import bound
from retrace.analyze.exact.kernels.candidates import candidates
from retrace.analyze.exact.kernels.flash import TILES, flash
from retrace.analyze.exact.kernels.inputs import Inputs
from retrace.analyze.exact.kernels.lists import MOST_RANKS, capacity_for, turns_for
from retrace.analyze.exact.kernels.order import order
from retrace.analyze.exact.top_k import top
from retrace.analyze.units.kernels.tiles import tiles_for
from retrace.analyze.units.unit import Block, scores_at_once

ROWS = 1 << 17
"""Queries of all heads that have group maxima and candidates at one time."""
LONGER = 4
"""How many times longer than the first the lists of a second try are."""
SECOND_ROWS = 1 << 14
"""Queries that have lists of a second try at one time."""
MOST_CHANNELS = 256
"""Of a key or value, beyond which tiles no longer fit."""


def fits(block: Block, ranks: int) -> bool:
    """Whether the kernels answer for this block's layer and this many ranks."""
    rules = block.unit.group.rules
    channels = max(rules.key_dim, rules.value_dim)
    return 0 < ranks <= MOST_RANKS and rules.scale > 0 and channels <= MOST_CHANNELS


def exact(block: Block, ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best keys (group, queries, ranks) int64 and their scores float64 as the pass rounds them, log
    normalizer (group, queries) float64 and output (group, queries, value channels) float32, -1 and
    -inf where a query sees fewer keys.

    Keys are ranked by their products with the query, summed in float32: a positive scale and a
    softcap keep that order.
    """
    with torch.cuda.device_of(block.queries):
        parts = [answers(Inputs.of(part), ranks) for part in _parts(block)]
    ids, scores, log_normalizer, output = (
        torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)
    )
    return ids, scores, log_normalizer, output


def answers(inputs: Inputs, ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for as many queries as there is memory for."""
    channels = max(inputs.queries.shape[-1], inputs.values.shape[-1])
    turns = turns_for(ranks, tiles_for(inputs.keys.dtype, channels, TILES).keys)
    output, log_normalizer, maxima = flash(inputs, turns)
    capacity = capacity_for(ranks)
    found, counts = candidates(inputs, bound(maxima, ranks), capacity)
    del maxima
    ids, products = order(found, counts, ranks, capacity)
    if (counts > capacity).any():
        counts = _second_try(ids, products, inputs, found, counts, capacity)
    # A list is too long where many keys tie. It is too short where the two passes round one
    # product differently; whatever the bound, a list with k of the products holds the k largest.
    visible = inputs.positions - inputs.first + 1
    wrong = (counts > capacity) | (counts < visible.clamp(max=ranks))
    if wrong.any():
        _repair(ids, products, log_normalizer, inputs, wrong)
    return ids, inputs.scores(products.double()), log_normalizer, output


def _parts(block: Block) -> list[Block]:
    step = max(1, ROWS // len(block.queries))
    starts = range(block.rows.start, block.rows.stop, step)
    return [Block(block.unit, slice(at, min(at + step, block.rows.stop))) for at in starts]


def _second_try(
    ids: Tensor,
    products: Tensor,
    inputs: Inputs,
    found: Tensor,
    counts: Tensor,
    capacity: int,
) -> Tensor:
    """Rank anew, in longer lists, the keys of the queries with more candidates than a list holds.

    Their bound is the k-th largest of the products that the list does hold, so that most of what
    the first bound let through is left out. Returns the counts (group, queries), more than
    `capacity` where the longer list does not do either.
    """
    counts, ranks = counts.clone(), ids.shape[-1]
    # In the order of the rows, so that queries of one tile see about the same keys.
    for row, head in (
        part.unbind(1) for part in (counts.T > capacity).nonzero().split(SECOND_ROWS)
    ):
        held = (found[head, row, :capacity] >> 32).int().view(torch.float32)
        queries = replace(
            inputs,
            queries=inputs.queries[head, row][None],
            positions=inputs.positions[row],
            first=inputs.first[row],
        )
        longer = LONGER * capacity
        more, again = candidates(queries, bound(held, ranks)[None], longer)
        best = order(more, again, ranks, longer)
        ids[head, row], products[head, row] = (tensor[0] for tensor in best)
        counts[head, row] = torch.where(again > longer, capacity + 1, again.clamp(max=capacity))[0]
    return counts


def _repair(
    ids: Tensor, products: Tensor, log_normalizer: Tensor, inputs: Inputs, wrong: Tensor
) -> None:
    """Rank all keys of the queries that are marked (group, queries), and sum the softmax's
    denominator from the same products."""
    keys, ranks = inputs.keys.float().T, ids.shape[-1]
    places = torch.arange(keys.shape[1], device=keys.device)
    step = max(1, scores_at_once(keys.device) // len(places))
    for head, row in (part.unbind(1) for part in wrong.nonzero().split(step)):
        every = inputs.queries[head, row].float() @ keys
        hidden = places > inputs.positions[row, None]
        hidden |= places < inputs.first[row, None]
        every.masked_fill_(hidden, -torch.inf)
        products[head, row], ids[head, row] = top(every, ranks)
        total = inputs.scores(every.double()).logsumexp(dim=-1)
        if inputs.sinks is not None:
            total = torch.logaddexp(total, inputs.sinks[head].double())
        log_normalizer[head, row] = total
