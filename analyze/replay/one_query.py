"""What methods attend for a single query, by the code that replays all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrace.analyze.exact.reference import exact_pass, refuse_unheld
from retrace.analyze.methods.base import BlockMethod, ScoreMethod
from retrace.analyze.methods.exact import Exact
from retrace.analyze.methods.hooks import naming
from retrace.analyze.metrics.buckets import buckets_of
from retrace.analyze.metrics.measure import ExactBlock, measure
from retrace.analyze.replay.plan import Replayed
from retrace.analyze.selection.select import select_together
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Unit, intact

EXACT = Exact()
COST = "bytes_ratio"
"""Told of many queries: a cache may be shared by other heads than a unit has."""


@dataclass(frozen=True)
class Attended:
    """Keys and what they hold of one query's attention."""

    ids: Tensor
    """Positions of the keys (keys,) int64, best first as who lists them ranks them."""
    probabilities: Tensor
    """Their exact attention (keys,) float64."""


@dataclass(frozen=True)
class MethodAnswer:
    """What a method attends for one query, and how near that comes."""

    method: str
    keys: Attended
    figures: dict[str, float]
    """By metric; those that are not defined for this query are left out."""


@dataclass(frozen=True)
class QueryAnswers:
    """One query of one head: exact attention and every method."""

    best: Attended
    """The keys of largest score, at most the budget."""
    visible: int
    """How many keys the query sees."""
    methods: tuple[MethodAnswer, ...]


def answer_one(
    unit: Unit, head: int, position: int, methods: Sequence[Replayed], protocol: Protocol
) -> QueryAnswers:
    """The best keys of a query, and what methods attend at their one budget.

    A query is answered in the block that it is in when all are replayed, from the state that it has
    there: of the keys and queries before it, as the protocol says.

    Args:
        unit: the query's kv head.
        head: the query's, by its place in the group.
        position: of the query; the unit has one there.
        methods: calibrated, each at one budget, the same for all.
        protocol: which keys states are built from.
    """
    (k,) = {k for method in methods for k in method.topk}
    block = next(unit.blocks(position, None, protocol.block or 1))
    row = int(torch.searchsorted(block.positions, position))
    with torch.inference_mode(), intact(unit):
        buckets = buckets_of(unit.positions, len(unit.keys), protocol)[:, block.rows]
        exact = ExactBlock(block, exact_pass(block, k), buckets)
        one = exact.rows(slice(row, row + 1), k)
        refuse_unheld(one.block, one.reference)
        answers = []
        for method in methods:
            with naming(method.spec):
                answers.append(_answer(exact, one, row, head, method, protocol))
        best = one.reference.ids[head, 0]
        best = best[best >= 0]
        return QueryAnswers(
            Attended(best, one.best_probabilities[head, 0, : len(best)]),
            int(one.block.visible_count[0]),
            tuple(answers),
        )


def _answer(
    exact: ExactBlock, one: ExactBlock, row: int, head: int, method: Replayed, protocol: Protocol
) -> MethodAnswer:
    """What a method attends for the query of a row; `one` is that query alone."""
    (k,) = method.topk
    selection = _selected(exact, row, method, protocol)
    point = selection.ks.index(k)
    measured = measure(one, selection, [point])
    figures = {name: float(f[point, head, 0]) for name, f in measured.at_all.items()}
    figures |= {name: float(f[0, head, 0]) for name, f in measured.at_points.items()}
    listed = selection.ids[head, 0]
    attended = selection.attended[point].expand(len(selection.ids), 1)[head, 0]
    keys = listed[: int(attended)]
    keys = keys[keys >= 0]
    shares = one.log_probabilities(selection.ids)[head, 0, : len(keys)].exp()
    return MethodAnswer(
        str(method.spec),
        Attended(keys, shares),
        # Nothing had to be found where candidates are all kept.
        {name: f for name, f in figures.items() if name != COST and f == f},
    )


def _selected(exact: ExactBlock, row: int, method: Replayed, protocol: Protocol) -> Selection:
    """What a method selects for the query of a row alone."""
    (k,) = method.topk
    own = method.spec.method
    ks = method.ks if isinstance(own, ScoreMethod | BlockMethod) else (k,)
    if own == EXACT:
        return exact.rows(slice(row, row + 1)).selection(ks)
    states = States(own, exact.block.unit, protocol, method.calibration)
    # Those that come before it in the block may build the state that it goes on with.
    served = next(s for s in states.serve(exact.block) if s.rows.start <= row < s.rows.stop)
    selections = select_together(own, [served], served.block, ks, method.topk)
    states.check_calibration()
    selection = next(s for s in selections if k in s.ks)
    place = row - served.rows.start
    return selection.rows(slice(place, place + 1))
