"""Keys that an index finds, and those that it does not hold."""

import torch

from retrace.analyze.methods.base import (
    SearchMethod,
)
from retrace.analyze.methods.hooks import calling, key_ids
from retrace.analyze.selection.by_score import only_visible
from retrace.analyze.selection.charges import aux_bytes
from retrace.analyze.selection.served import Served
from retrace.analyze.units.attention import first_visible
from retrace.analyze.units.selection import ALL_READ, Selection, check_ids, where
from retrace.analyze.units.unit import Block
from retrace.traces import RetraceError


def select_by_search(method: SearchMethod, served: Served, block: Block, k: int) -> Selection:
    """The index's answer and the visible keys that it does not hold, ranked by exact score: an
    index compares the keys that it meets with the query, and that is its own order."""
    state, first, indexed = served.state, served.first, served.held
    positions, group = block.positions, block.unit.group
    oldest = int(first_visible(positions[:1], group.rules))
    others = torch.arange(oldest, block.end, device=positions.device)
    others = others[(others < first) | (others >= indexed)]
    candidates = others.expand(*block.queries.shape[:2], -1)
    if state is not None:
        queries = block.queries * group.rules.scale
        with calling("search()", lambda: where(block)):
            found = method.search(state, queries, k)
        found = key_ids(found, "search()", lambda: where(block), queries)
        if found.dim() != 3 or found.shape[:2] != block.queries.shape[:2]:
            raise RetraceError(
                f"search() gave shape {tuple(found.shape)} at {where(block)}; expected (group, "
                f"queries, ids) = {(*block.queries.shape[:2], k)}."
            )
        found = torch.where(found < 0, found, found + first)
        check_ids(found, block)
        candidates = torch.cat([found, candidates], dim=-1)
    # Ascending, so that a stable sort by score leaves ties to the lower key.
    candidates = only_visible(candidates, block).sort(dim=-1).values
    order = block.scores_at(candidates).argsort(dim=-1, descending=True, stable=True)
    ids = candidates.gather(-1, order[..., :k])
    # All keys of the index are visible to these queries.
    unindexed = block.visible_count - (indexed - first)
    reads_cache = state is not None and method.reads_cache(state, group)
    return Selection(
        (k,),
        ids,
        (ids >= 0).sum(dim=-1)[None],
        sink=first,
        first_given=positions.new_full((1, len(positions)), indexed),
        aux_bytes=aux_bytes(method, [(state, block)], block) + unindexed * group.key_bytes,
        attended_bytes=method.attended_bytes(group),
        unread=ALL_READ if reads_cache else (first, indexed),
    )
