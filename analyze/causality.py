"""Catching a method whose answer depends on keys that come after the query."""

import dataclasses

import torch

from retrace.analyze.methods.base import Method
from retrace.analyze.select import select
from retrace.analyze.selection import Selection, where
from retrace.analyze.states import Protocol, States
from retrace.analyze.unit import Block, Unit
from retrace.traces import RetraceError

PROBES = (0.3, 0.6, 0.9)
"""Where in a unit's queries the future is changed, as fractions."""


def check_causality(
    method: Method, unit: Unit, protocol: Protocol, ks: list[int], first_position: int
) -> None:
    """Change every key and value after a query and demand the same answer, bit for bit.

    Shapes stay as they are, so that a method that sees no later key repeats the same arithmetic.

    Raises:
        RetraceError: the answer changed, or is not even the same when asked twice.
    """
    first_row = int(torch.searchsorted(unit.positions, first_position))
    rows = len(unit.positions) - first_row
    for row in sorted({first_row + int(fraction * rows) for fraction in PROBES}):
        if row >= len(unit.positions) or int(unit.positions[row]) >= len(unit.keys) - 1:
            continue
        block = Block(unit, slice(row, row + 1))
        answer = _answer(method, unit, row, protocol, ks)
        if not _same(answer, _answer(method, unit, row, protocol, ks)):
            raise RetraceError(
                f"answered {where(block, 0, 0)} differently when asked twice: derive its random "
                "numbers from the head group and the query's position."
            )
        if not _same(answer, _answer(method, _other_future(unit, row), row, protocol, ks)):
            raise RetraceError(
                f"sees the future: its answer at {where(block, 0, 0)} changes with keys after it."
            )


def _answer(
    method: Method, unit: Unit, row: int, protocol: Protocol, ks: list[int]
) -> list[Selection]:
    block = Block(unit, slice(row, row + 1))
    served = States(method, unit, protocol).serve(block)
    return [
        selection
        for rows, state, indexed in served
        for selection in select(method, state, indexed, block.part(rows), ks)
    ]


def _other_future(unit: Unit, row: int) -> Unit:
    """The unit with other keys and values after the query of this row, and the same before."""
    after = int(unit.positions[row]) + 1
    keys, values = unit.keys.clone(), unit.values.clone()
    keys[after:] = -3 * keys[after:].flip(0) + 1
    values[after:] = -3 * values[after:].flip(0) + 1
    return dataclasses.replace(unit, keys=keys, values=values)


def _same(ours: list[Selection], others: list[Selection]) -> bool:
    return all(
        torch.equal(a.ids, b.ids)
        and torch.equal(a.attended, b.attended)
        and (a.output is None or (b.output is not None and torch.equal(a.output, b.output)))
        for a, b in zip(ours, others, strict=True)
    )
