"""Keys that evictions leave while a model decodes, and all that came since the last one."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from retrace.analyze.methods.base import EvictionMethod
from retrace.analyze.selection.by_eviction import since_then
from retrace.analyze.selection.evictions import Evicted
from retrace.analyze.selection.merging import merged_output
from retrace.analyze.selection.served import Served, Stretch, stretches
from retrace.analyze.units.selection import Selection, joined
from retrace.analyze.units.unit import Block


def select_by_decoding(
    method: EvictionMethod, serves: Sequence[Served], block: Block, ks: Sequence[int]
) -> list[Selection]:
    """What the last eviction before each query left under each budget, and the keys since. Budgets
    have lists of their own: what a small one drops, a larger one may judge again."""
    parts = stretches(serves, block)
    past = [i for i, part in enumerate(parts) for _ in part.block.positions]
    ends = [served.built for served in serves]
    nothing = torch.zeros(len(block.positions), device=block.positions.device)
    found = []
    for k in ks:
        left = joined([_left(method, served.state, block, k) for served in serves])
        selection = since_then(left, past, ends, block, nothing)
        if method.merge != "none":
            selection = _with_outputs(selection, parts, k)
        found.append(selection)
    return found


def _with_outputs(selection: Selection, parts: Sequence[Stretch], k: int) -> Selection:
    """A selection with the output over what the cache holds, eviction by eviction."""
    outputs = []
    for part in parts:
        state = part.served.state
        left = state.evictions.left(state.number, k)
        kept, end = left.ids.sort().values, state.evictions.end(state.number)
        own = selection.rows(part.rows)
        outputs.append(merged_output(own, part.block, left.held, kept, end))
    return replace(selection, output=torch.cat(outputs, dim=2))


def _left(method: EvictionMethod, state: Evicted, block: Block, k: int) -> Selection:
    """What an eviction left, as a selection of one query."""
    evictions = state.evictions
    left = evictions.left(state.number, k)
    number = left.ids.new_tensor
    return Selection(
        (k,),
        left.ids.expand(len(block.queries), 1, -1),
        number([[[len(left.ids)]]]),
        sink=evictions.prompt or method.keep.at(k)[0],
        first_given=number([[left.first_given]]),
        extra_keys=number([evictions.prompt]),
        attended_bytes=method.attended_bytes(block.unit.group),
    )
