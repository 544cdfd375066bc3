"""Keys that the end of a past leaves, the same for every query since."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from retrace.analyze.methods.base import (
    EvictionMethod,
)
from retrace.analyze.selection.by_score import (
    kept_ids,
    keys_in_pages,
    only_visible,
    select_by_score,
)
from retrace.analyze.selection.charges import aux_bytes
from retrace.analyze.selection.served import Served, stretches
from retrace.analyze.units.attention import first_visible
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block, Unit


def select_by_eviction(
    method: EvictionMethod, serves: Sequence[Served], block: Block, ks: Sequence[int]
) -> list[Selection]:
    """What the end of each past leaves, the same for every query until the next, and all that came
    later.

    Chosen once: what a later query would choose otherwise, because a layer's window or the recent
    keys that it keeps have moved on, is gone.
    """
    ends = [served.built for served in serves]
    ended = ends_of_pasts(block.unit, ends)
    of_unit = {unit.group.kv_head: ends_of_pasts(unit, ends).unit for unit, _ in serves[0].heads}
    judged = [
        replace(
            served,
            rows=slice(i, i + 1),
            heads=tuple((of_unit[unit.group.kv_head], state) for unit, state in served.heads),
        )
        for i, served in enumerate(serves)
    ]
    left = select_by_score(method, judged, ended, ks)
    parts = stretches(serves, block)
    aux = aux_bytes(method, [(part.served.state, part.block) for part in parts], block)
    past = [i for i, part in enumerate(parts) for _ in part.block.positions]
    return [since_then(kept, past, ends, block, aux) for kept in left]


def ends_of_pasts(unit: Unit, ends: Sequence[int]) -> Block:
    """A query at the last position before each end, which sees what the next one will see of the
    keys so far. What it asks does not matter where keys are judged without it."""
    last = unit.positions.new_tensor(ends) - 1
    group, _, channels = unit.queries.shape
    queries = unit.queries.new_zeros((group, 1, channels)).expand(-1, len(ends), -1)
    block = Block(replace(unit, queries=queries, positions=last), slice(0, len(ends)))
    block.__dict__["first_visible"] = first_visible(last + 1, unit.group.rules)
    return block


def since_then(
    left: Selection, past: list[int], ends: list[int], block: Block, aux: Tensor
) -> Selection:
    """The keys since the past of each of the block's queries, the newest first, and those of a
    selection (group, pasts, listed) that it still sees.

    Args:
        left: what is left of each past.
        past: which of them comes before each query.
        ends: where they end.
        block: the queries.
        aux: bytes that are read to find the keys (queries,).
    """
    which = block.positions.new_tensor(past)
    left = left.rows_at(which)
    new = kept_ids(0, block.positions.new_tensor(ends)[which], block)
    new_count = (new >= 0).sum(dim=-1)
    old = only_visible(left.ids, block)
    still = torch.nn.functional.pad((old >= 0).cumsum(dim=-1), (1, 0))
    ids = torch.cat([new.expand(len(old), -1, -1), old], dim=-1)
    order = (ids < 0).to(torch.uint8).argsort(dim=-1, stable=True)
    estimates = left.estimates
    if estimates is not None:
        none = estimates.new_zeros(*estimates.shape[:2], new.shape[-1])
        estimates = torch.cat([none, estimates], dim=-1).gather(-1, order)
    return replace(
        left,
        ids=ids.gather(-1, order),
        attended=new_count + keys_in_pages(still, left.attended),
        extra_keys=new_count[0] + left.extra_keys,
        estimates=estimates,
        aux_bytes=aux,
    )
