"""Catching a method whose answer depends on keys that come after the query."""

import dataclasses

import torch
from torch import Tensor

from retrace.analyze.methods.base import Method
from retrace.analyze.select import select
from retrace.analyze.selection import Selection, where
from retrace.analyze.states import Calibration, Protocol, States
from retrace.analyze.unit import Block, Unit, intact
from retrace.traces import RetraceError

PROBES = (0.3, 0.6, 0.9)
"""Where in a unit's queries the future is changed, as fractions."""


def check_causality(
    method: Method,
    unit: Unit,
    protocol: Protocol,
    ks: list[int],
    first_position: int,
    calibration: Calibration | None = None,
) -> None:
    """Change every key, value and query after a query and demand the same answer, bit for bit.

    Shapes stay as they are, so that a method that sees no later key repeats the same arithmetic.

    Raises:
        RetraceError: the answer changed, or is not even the same when asked twice.
    """

    def answer(unit: Unit, row: int) -> list[Selection]:
        block = Block(unit, slice(row, row + 1))
        states = States(method, unit, protocol, calibration)
        with intact(unit):
            found = [
                selection
                for served in states.serve(block)
                for selection in select(method, served, block.part(served.rows), ks)
            ]
            states.check_calibration()
        return found

    first_row = int(torch.searchsorted(unit.positions, first_position))
    rows = len(unit.positions) - first_row
    for row in sorted({first_row + int(fraction * rows) for fraction in PROBES}):
        if row >= len(unit.positions) or int(unit.positions[row]) >= len(unit.keys) - 1:
            continue
        block = Block(unit, slice(row, row + 1))
        first = answer(unit, row)
        if not _same(first, answer(unit, row)):
            raise RetraceError(
                f"answered {where(block, 0, 0)} differently when asked twice: derive its random "
                "numbers from the head group and the query's position."
            )
        if not _same(first, answer(_other_future(unit, row), row)):
            raise RetraceError(
                f"sees the future: its answer at {where(block, 0, 0)} changes with keys after it."
            )


def _other_future(unit: Unit, row: int) -> Unit:
    """The unit with other keys, values and queries after the query of this row, its neighbours'
    too, and the same before."""
    position = int(unit.positions[row])

    def change(unit: Unit) -> Unit:
        seen = int(torch.searchsorted(unit.positions, position, right=True))
        return dataclasses.replace(
            unit,
            keys=_other_end(unit.keys, position + 1, 0),
            values=_other_end(unit.values, position + 1, 0),
            queries=_other_end(unit.queries, seen, 1),
        )

    changed = change(unit)
    if unit.neighbours is None:
        return changed
    return dataclasses.replace(changed, neighbours=unit.neighbours.changed(change))


def _other_end(tensor: Tensor, start: int, axis: int) -> Tensor:
    """Other numbers from this place of an axis on."""
    length = tensor.shape[axis]
    end = tensor.narrow(axis, start, length - start)
    return torch.cat([tensor.narrow(axis, 0, start), -3 * end.flip(axis) + 1], dim=axis)


def _same(ours: list[Selection], others: list[Selection]) -> bool:
    return all(
        torch.equal(a.ids, b.ids)
        and torch.equal(a.attended, b.attended)
        and (a.output is None or (b.output is not None and torch.equal(a.output, b.output)))
        for a, b in zip(ours, others, strict=True)
    )
