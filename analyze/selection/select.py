"""How each level of method turns its answer into a selection."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from retrace.analyze.methods.base import (
    AttendMethod,
    BlockMethod,
    EvictionMethod,
    Method,
    PolicyMethod,
    ScoreMethod,
    SearchMethod,
)
from retrace.analyze.selection.by_attend import select_by_attend
from retrace.analyze.selection.by_blocks import select_by_blocks
from retrace.analyze.selection.by_decoding import select_by_decoding
from retrace.analyze.selection.by_eviction import select_by_eviction
from retrace.analyze.selection.by_score import select_by_score
from retrace.analyze.selection.by_search import select_by_search
from retrace.analyze.selection.evictions import Evicted
from retrace.analyze.selection.from_cache import select_from_cache
from retrace.analyze.selection.served import Served
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block


def select(method: Method, served: Served, block: Block, ks: Sequence[int]) -> list[Selection]:
    """What a method attends for a block's queries at each budget of `ks`, ascending.

    Args:
        method: the method.
        served: its state for these queries.
        block: the queries.
        ks: the budgets. Those that share one ranked list share a selection.
    """
    return select_together(method, [served], block, ks)


def select_together(
    method: Method,
    serves: Sequence[Served],
    block: Block,
    ks: Sequence[int],
    points: Collection[int] | None = None,
) -> list[Selection]:
    """The same for queries that one state after another answers, or none does; only methods that
    score or attend have more than one answered at once. Where the output is computed here, from a
    cache in few bits, it is at those budgets that `points` name, or at all."""
    if isinstance(method, PolicyMethod):
        [served] = serves
        method, state = method.answering(served.state)
        serves = [replace(served, state=state)]
    if method.cache is None:
        return _select(method, serves, block, ks)
    return select_from_cache(method, serves, block, ks, ks if points is None else points, _select)


def _select(
    method: Method, serves: Sequence[Served], block: Block, ks: Sequence[int]
) -> list[Selection]:
    if isinstance(method, EvictionMethod) and isinstance(serves[0].state, Evicted):
        return select_by_decoding(method, serves, block, ks)
    if isinstance(method, EvictionMethod) and serves[0].state is not None:
        return select_by_eviction(method, serves, block, ks)
    if isinstance(method, ScoreMethod):
        return select_by_score(method, serves, block, ks)
    if isinstance(method, AttendMethod):
        return [select_by_attend(method, serves, block, k) for k in ks]
    [served] = serves
    if isinstance(method, SearchMethod):
        return [select_by_search(method, served, block, k) for k in ks]
    if isinstance(method, BlockMethod):
        return select_by_blocks(method, served, block, ks)
    raise TypeError(
        f"{type(method).__name__} must be a ScoreMethod, a SearchMethod, an AttendMethod or a "
        "BlockMethod."
    )
