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
from retrace.analyze.selection.states import Served
from retrace.analyze.units.attention import first_visible
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block, Unit


def select_by_eviction(
    method: EvictionMethod, served: Served, block: Block, ks: Sequence[int]
) -> list[Selection]:
    """What the end of the past leaves, the same for every query since, and all that came later.

    Chosen once: what a later query would choose otherwise, because a layer's window or the recent
    keys that it keeps have moved on, is gone.
    """
    ended = _end_of_past(block.unit, served.built)
    heads = [(_end_of_past(unit, served.built).unit, state) for unit, state in served.heads]
    left = select_by_score(method, replace(served, heads=tuple(heads)), ended, ks)
    aux = aux_bytes(method, served.state, block)
    return [_since(kept, served.built, block, aux) for kept in left]


def _end_of_past(unit: Unit, end: int) -> Block:
    """A query at the last position before `end`, which sees what the next one will see of the keys
    so far. What it asks does not matter where keys are judged without it."""
    last = unit.positions.new_tensor([end - 1])
    block = Block(
        replace(unit, queries=torch.zeros_like(unit.queries[:, :1]), positions=last), slice(0, 1)
    )
    block.__dict__["first_visible"] = first_visible(last + 1, unit.group.rules)
    return block


def _since(left: Selection, built: int, block: Block, aux: Tensor) -> Selection:
    """The keys from `built` on, the newest first, and those of a selection (group, 1, listed) that
    each of the block's queries still sees; `aux` bytes (queries,) are read to find them."""
    first = torch.full_like(block.positions, built)
    new = kept_ids(0, first, block)
    new_count = (new >= 0).sum(dim=-1)
    old = only_visible(left.ids.expand(-1, len(block.positions), -1), block)
    still = torch.nn.functional.pad((old >= 0).cumsum(dim=-1), (1, 0))
    ids = torch.cat([new.expand(len(old), -1, -1), old], dim=-1)
    order = (ids < 0).to(torch.uint8).argsort(dim=-1, stable=True)
    estimates = left.estimates
    if estimates is not None:
        known = estimates.expand(-1, len(block.positions), -1)
        estimates = torch.cat([known.new_zeros(*known.shape[:2], new.shape[-1]), known], dim=-1)
        estimates = estimates.gather(-1, order)
    given = left.first_given
    return replace(
        left,
        ids=ids.gather(-1, order),
        attended=new_count + keys_in_pages(still, left.attended),
        first_given=None if given is None else given.expand(-1, len(block.positions)),
        extra_keys=new_count[0],
        estimates=estimates,
        aux_bytes=aux,
    )
