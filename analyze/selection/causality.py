"""Catching a method whose answer to a query depends on anything but the query and what it sees.

That is on keys that come after it, on other queries that it is answered with, or on what was asked
before.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retrace.analyze.methods.base import Method, ScoreMethod
from retrace.analyze.selection.by_score import visible_scores
from retrace.analyze.selection.evictions import Evicted
from retrace.analyze.selection.select import select
from retrace.analyze.selection.served import Served
from retrace.analyze.selection.states import Calibration, States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.selection import Selection, where
from retrace.analyze.units.unit import Block, Unit, intact
from retrace.traces import RetraceError

PROBES = (0.3, 0.6, 0.9)
"""Where in a unit's queries the future is changed, as fractions."""
ROUNDING = 1e-4
"""How far an output may be from another that was summed in another order, relative to its norm."""
NOISE = 1e-5
"""Relative change of a query that shows which keys another rounding may turn."""
DRAWS = 8
"""Such changes that are tried."""


def check_causality(
    method: Method,
    unit: Unit,
    protocol: Protocol,
    ks: list[int],
    first_position: int,
    calibration: Calibration | None = None,
    anew: Callable[[], Method] | None = None,
) -> None:
    """Demand that the answer to a query is the same alone, in a block, among other queries, with
    another future, and whatever was asked before.

    Answers to the same shapes are compared bit for bit, since a method that sees nothing else
    repeats the same arithmetic; of other shapes within what rounding may turn.

    Args:
        method: the method.
        unit: one that it will be replayed on.
        protocol: which keys its state is built from.
        ks: the budgets.
        first_position: the first that is answered.
        calibration: what it has learned.
        anew: makes the method as it is before anything was asked; a copy if None.

    Raises:
        RetraceError: the answer changed, or is not even the same when asked twice.
    """
    first_row = int(torch.searchsorted(unit.positions, first_position))
    rows = len(unit.positions) - first_row
    if rows < 1:
        return
    asked = _Asked(method, protocol, ks, calibration)
    fresh = dataclasses.replace(method) if anew is None else anew()
    _check_memory(asked, dataclasses.replace(asked, method=fresh), unit, first_row + rows // 2)
    for row in sorted({first_row + int(fraction * rows) for fraction in PROBES}):
        _check_query(asked, unit, row, first_position)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A method, and what it is asked for."""

    method: Method
    protocol: Protocol
    ks: list[int]
    calibration: Calibration | None

    def served(self, unit: Unit, row: int) -> tuple[States, Served]:
        """A new state for the query of a row."""
        states = States(self.method, unit, self.protocol, self.calibration)
        (served,) = states.serve(Block(unit, slice(row, row + 1)))
        return states, served

    def answer(self, served: Served, block: Block) -> list[Selection]:
        """What it selects for the queries of a block by a state. A copy: it may use its tensors
        again."""
        return [*map(_copy, select(self.method, served, block, self.ks))]

    def scores_alike(self, served: Served, block: Block, other: Block, row: int) -> bool:
        """Whether it scores one query of two blocks of a shape alike, however little other queries
        turn in what it selects."""
        if not isinstance(self.method, ScoreMethod) or served.state is None:
            return True
        if isinstance(served.state, Evicted):
            return True  # which asks no query
        ours, theirs = (
            visible_scores(self.method, served.state, b)[:, row].double() for b in (block, other)
        )
        finite = ours[ours.isfinite()].abs()
        near = ROUNDING * float(finite.max()) if len(finite) else 0.0
        return torch.allclose(ours, theirs, rtol=0.0, atol=near)

    def alone(self, unit: Unit, row: int) -> list[Selection]:
        """What it selects for one query by a new state."""
        with intact(unit):
            states, served = self.served(unit, row)
            answer = self.answer(served, Block(unit, slice(row, row + 1)))
            states.check_calibration()
            return answer


def _check_memory(asked: _Asked, fresh: _Asked, unit: Unit, row: int) -> None:
    """Ask for two sequences in either order."""
    other = changed_after(unit, -1)
    first, later = asked.alone(unit, row), asked.alone(other, row)
    if _same(fresh.alone(other, row), later) and _same(fresh.alone(unit, row), first):
        return
    place = where(Block(unit, slice(row, row + 1)))
    if not _same(first, asked.alone(unit, row)):
        raise _not_twice(place)
    raise RetraceError(
        f"keeps something between calls: its answer at {place} depends on which sequence was asked "
        "for before. Keep it in the state that build() gives."
    )


def _check_query(asked: _Asked, unit: Unit, row: int, first_position: int) -> None:
    """Ask for one query alone and in the block that a run answers it in."""
    one = Block(unit, slice(row, row + 1))
    place, position = where(one), int(unit.positions[row])
    alone = asked.alone(unit, row)
    if not _same(alone, asked.alone(unit, row)):
        raise _not_twice(place)
    with intact(unit):
        states, served = asked.served(unit, row)
        block = _block_of(unit, row, first_position)
        rows = states.together(block, row - block.rows.start)
        rows = slice(block.rows.start + rows.start, block.rows.start + rows.stop)
        inside = row - rows.start
        together = asked.answer(served, Block(unit, rows))
        if not _same(alone, asked.answer(served, one)):
            raise RetraceError(
                f"keeps something between calls: its answer at {place} depends on which queries "
                "were asked for before."
            )
        differing = dataclasses.replace(
            served, heads=tuple((_other_queries(u, rows, row), s) for u, s in served.heads)
        )
        among = Block(_other_queries(unit, rows, row), rows)
        others = asked.answer(differing, among)
        if not _alike(
            asked, served, one, _row(together, inside), _row(others, inside)
        ) or not asked.scores_alike(served, Block(unit, rows), among, inside):
            raise RetraceError(
                f"mixes queries: its answer at {place} changes with other queries of its block. "
                "Each row must be answered by itself."
            )
        if not _alike(asked, served, one, alone, _row(together, inside)):
            raise RetraceError(
                f"answered {place} differently alone and in a block of {len(block.positions)} "
                "queries: an answer must not depend on where a block begins or ends."
            )
    if position >= len(unit.keys) - 1:
        return  # there is no future
    changed = changed_after(unit, position)
    _, served = asked.served(changed, row)
    late = asked.answer(served, Block(changed, rows))
    if not _same(alone, asked.answer(served, Block(changed, one.rows))) or not _alike(
        asked, served, one, _row(together, inside), _row(late, inside)
    ):
        raise RetraceError(
            f"sees the future: its answer at {place} changes with keys and queries after it."
        )


def _not_twice(place: str) -> RetraceError:
    return RetraceError(
        f"answered {place} differently when asked twice: derive its random numbers from the head "
        "group and the query's position."
    )


def _block_of(unit: Unit, row: int, first_position: int) -> Block:
    """The block that a run answers a row in."""
    for block in unit.blocks(first_position):
        if row < block.rows.stop:
            return block
    raise IndexError(row)


def changed_after(unit: Unit, position: int) -> Unit:
    """A unit with other keys, values and queries after a position, and its neighbours too."""

    def change(unit: Unit) -> Unit:
        return _other_past_and_future(unit, position)

    neighbours = unit.neighbours and unit.neighbours.changed(change)
    return dataclasses.replace(change(unit), neighbours=neighbours)


def _other_past_and_future(unit: Unit, position: int) -> Unit:
    """The unit with other keys, values and queries after a position, and the same before."""
    seen = int(torch.searchsorted(unit.positions, position, right=True))
    return dataclasses.replace(
        unit,
        keys=_other_end(unit.keys, position + 1, 0),
        values=_other_end(unit.values, position + 1, 0),
        queries=_other_end(unit.queries, seen, 1),
    )


def _other_queries(unit: Unit, rows: slice, kept: int) -> Unit:
    """The unit with other queries in some rows, but for one."""
    queries = unit.queries.clone()
    queries[:, rows] = -3 * queries[:, rows].flip(1) + 1
    queries[:, kept] = unit.queries[:, kept]
    return dataclasses.replace(unit, queries=queries)


def _other_end(tensor: Tensor, start: int, axis: int) -> Tensor:
    """Other numbers from this place of an axis on."""
    length = tensor.shape[axis]
    end = tensor.narrow(axis, start, length - start)
    return torch.cat([tensor.narrow(axis, 0, start), -3 * end.flip(axis) + 1], dim=axis)


def _copy(selection: Selection) -> Selection:
    tensors: dict[str, Any] = {
        f.name: value.clone()
        for f in dataclasses.fields(selection)
        if isinstance(value := getattr(selection, f.name), Tensor)
    }
    return dataclasses.replace(selection, **tensors)


def _row(selections: list[Selection], row: int) -> list[Selection]:
    """What was selected for one query of a block."""
    return [whole.rows(slice(row, row + 1)) for whole in selections]


def _same(ours: list[Selection], others: list[Selection]) -> bool:
    """Whether two answers to one query are the same bit for bit."""
    return all(
        torch.equal(a.ids, b.ids)
        and torch.equal(a.attended, b.attended)
        and (a.output is None or (b.output is not None and torch.equal(a.output, b.output)))
        for a, b in zip(ours, others, strict=True)
    )


def _alike(
    asked: _Asked, served: Served, one: Block, ours: list[Selection], others: list[Selection]
) -> bool:
    """Whether two answers to one query, given among other queries, differ by what rounding may turn
    at most."""
    if _same(ours, others):
        return True
    lists = [(head, a, b) for (head, a), (_, b) in zip(_listed(ours), _listed(others), strict=True)]
    if any(a != b for _, a, b in lists):
        noisy = [_listed(asked.answer(*_noisy(served, one, draw))) for draw in range(DRAWS)]
        return all(
            (a ^ b) <= set().union(*(a ^ answer[i][1] for answer in noisy)) | _tied(one, head, a, b)
            for i, (head, a, b) in enumerate(lists)
        )
    return all(
        a.output is None
        or b.output is None
        or bool((a.output - b.output).norm() <= ROUNDING * a.output.norm())
        for a, b in zip(ours, others, strict=True)
    )


def _listed(answer: list[Selection]) -> list[tuple[int, set[int]]]:
    """Head by head and budget by budget, the keys that one query attends, and those of its best
    that count for recall."""
    found = []
    for selection in answer:
        heads = len(selection.ids)
        attended = selection.attended[:, :, 0].expand(-1, heads).tolist()
        for head, ids in enumerate(selection.ids[:, 0].tolist()):
            for budget, k in enumerate(selection.ks):
                count = attended[budget][head]
                found += [(head, {*ids[:n]} - {-1}) for n in (count, min(k, count))]
    return found


def _noisy(served: Served, one: Block, draw: int) -> tuple[Served, Block]:
    """The query of a block with a little noise, for the state that answers it."""
    row = one.rows.start

    def noisy(unit: Unit) -> Unit:
        generator = torch.Generator().manual_seed(draw)
        queries = unit.queries.clone()
        noise = torch.randn(queries[:, row].shape, generator=generator).to(queries)
        queries[:, row] *= 1 + NOISE * noise
        return dataclasses.replace(unit, queries=queries)

    heads = tuple((noisy(unit), state) for unit, state in served.heads)
    return dataclasses.replace(served, heads=heads), Block(noisy(one.unit), one.rows)


def _tied(one: Block, head: int, ours: set[int], others: set[int]) -> set[int]:
    """Those keys of one answer alone that score as high as one of the other answer alone, such as
    keys that are equal."""
    scores = one.scores[head, 0]
    near = NOISE * float(scores[scores.isfinite()].abs().max())
    found = set()
    for a in ours - others:
        for b in others - ours:
            if abs(float(scores[a]) - float(scores[b])) <= near:
                found |= {a, b}
    return found
