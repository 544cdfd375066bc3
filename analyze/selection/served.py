"""Which state answers which queries."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Block, Unit


@dataclass(frozen=True)
class Served:
    """Some queries of a block, and the state that answers them."""

    rows: slice
    """Which of the block's queries."""
    block: Block
    """These alone."""
    state: Any
    """None while there is none, when all keys are searched exactly."""
    built: int
    """Keys that the state was built from."""
    held: int
    """Keys that it holds, those that joined later included."""
    first: int
    """Position of the first of them, from which the state counts its keys."""
    heads: tuple[tuple[Unit, Any], ...] = ()
    """Every kv head of the layer with its state, where the method pools over the layer."""
    protocol: Protocol = field(default_factory=Protocol)
    """Which queries are answered together."""
    shown: Unit | None = None
    """What the method's cache gives back for these queries; None where it names none."""
    shown_at: int = 0
    """The first position whose query finds the same in the cache."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive queries of a block that one state answers."""

    rows: slice
    """Which of the block's."""
    block: Block
    """These alone."""
    served: Served
    """What answers them: its own rows and block are not looked at."""


def stretches(serves: Sequence[Served], block: Block) -> list[Stretch]:
    """A block's queries, cut where the state changes."""
    if len(serves) == 1:
        return [Stretch(slice(0, len(block.positions)), block, serves[0])]
    begin = serves[0].rows.start
    rows = [slice(served.rows.start - begin, served.rows.stop - begin) for served in serves]
    return [Stretch(r, block.part(r), served) for r, served in zip(rows, serves, strict=True)]
