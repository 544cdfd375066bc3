"""Catching a method that chooses for a block of queries by anything but what it says it looks at:
keys or queries that come later, or what was asked before."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from retrace.analyze.methods.base import BlockMethod, Method
from retrace.analyze.selection.causality import changed_after
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import Calibration, States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.selection import Selection, where
from retrace.analyze.units.unit import Block, Unit, intact
from retrace.traces import RetraceError

PROBES = (0.3, 0.6, 0.9)
"""Which blocks of a unit's queries are asked for, as fractions."""


def check_blocks(
    method: BlockMethod,
    unit: Unit,
    protocol: Protocol,
    ks: list[int],
    calibration: Calibration | None = None,
    anew: Callable[[], Method] | None = None,
) -> None:
    """Demand that a method chooses the same for a block of queries when it is asked twice, among
    other blocks, and with another future after the last query that it may look at.

    Args:
        method: the method.
        unit: one that it will be replayed on, with a query at every position.
        protocol: which queries are answered together.
        ks: the budgets.
        calibration: what it has learned.
        anew: makes the method as it is before anything was asked; a copy if None.

    Raises:
        RetraceError: the choice changed.
    """
    check_every_query(unit)
    assert protocol.block is not None
    length, size = len(unit.keys), protocol.block
    blocks = -(-length // size)
    fresh = replace(method) if anew is None else anew()
    for one in sorted({int(fraction * blocks) for fraction in PROBES}):
        rows = slice(one * size, min((one + 1) * size, length))

        def ask(own: Method, of: Unit, rows: slice = rows) -> list[Selection]:
            with intact(of):
                states = States(own, of, protocol, calibration)
                block = Block(of, rows)
                (served,) = states.serve(block)
                answer = select(own, served, served.block, ks)
                states.check_calibration()
                return answer

        place = where(Block(unit, rows))
        alone = ask(method, unit)
        if not _same(alone, ask(method, unit)):
            raise RetraceError(
                f"chose differently for the block of {place} when asked twice: derive its random "
                "numbers from the head group and the block's position."
            )
        seen = rows.stop - 1
        if method.looks == "end":
            seen = protocol.chunk_of(rows.start, length)[1] - 1
        if seen < length - 1:
            other = changed_after(unit, seen)
            if not _same(alone, ask(method, other)):
                raise RetraceError(
                    f"sees the future: its choice for the block of {place} changes with keys and "
                    f"queries after position {seen}, the last that it says it looks at."
                )
            if not _same(alone, ask(fresh, unit)):
                raise RetraceError(
                    f"keeps something between calls: its choice for the block of {place} depends "
                    "on which sequence was asked for before. Keep it in the state that build() "
                    "gives."
                )


def check_every_query(unit: Unit) -> None:
    """Refuse a sequence of which the trace holds some queries only.

    Raises:
        RetraceError: it does.
    """
    if len(unit.positions) != len(unit.keys):
        raise RetraceError(
            f"chooses for whole blocks of queries, and the trace holds {len(unit.positions):,} of "
            f"{len(unit.keys):,}: capture all of them (--queries all)."
        )


def _same(ours: list[Selection], others: list[Selection]) -> bool:
    """Whether two answers attend the same keys."""
    return all(
        _equal(a.ids, b.ids) and _equal(a.attended, b.attended)
        for a, b in zip(ours, others, strict=True)
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other))
