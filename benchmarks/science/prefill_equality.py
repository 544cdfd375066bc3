"""Do three methods of prefill choose what their published formulas say, on a model's own attention?

    python -m benchmarks.science.prefill_equality --trace t.zarr --layers 2,12,22

Holds what retrace chooses for each block of queries of a trace's first sequence, with every head of
some layers, against `prefill_formulas` in float64. A unit of keys that only one of them chooses is
set apart where scores rounded to float32 bring it in or leave it out; of others there must be none.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.page import origin, parser, publish
from benchmarks.science.prefill_formulas import (
    ROUNDING,
    Array,
    Choice,
    flexprefill,
    vertical_slash,
    xattention,
)
from retrace.analyze import BlockMethod, parse_spec
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Unit, load_units
from retrace.traces import Trace, open_trace

Formula = Callable[[Array, Array, int], list[Choice]]


@dataclass
class Compared:
    """Pairs of a block of queries and a unit of keys, over heads."""

    pairs: int = 0
    chosen: int = 0
    """By retrace."""
    undecided: int = 0
    """That some rounding brings in, and another leaves out."""
    rounded: int = 0
    """Of these, what only one of the two chooses."""
    different: int = 0
    """What only one chooses whatever the rounding."""


def compare(
    spec: str, k: int, rows: int, formula: Formula, trace: Trace, layers: Sequence[int]
) -> Compared:
    """Hold a method at budget k against its formula, in blocks of so many rows of the first
    sequence's queries."""
    found = Compared()
    for layer in layers:
        for unit in load_units(trace.layer(layer), trace.sequences[0], torch.device("cpu")):
            scale = unit.group.rules.scale
            keys, size = unit.keys.double().numpy(), 0
            expected = [
                formula(queries.double().numpy() * scale, keys, rows) for queries in unit.queries
            ]
            for place, heads in enumerate(choices(spec, unit, k, rows)):
                for head, (ours, size) in enumerate(heads):
                    _count(found, ours, expected[head][place], size)
    return found


def choices(spec: str, unit: Unit, k: int, rows: int) -> Iterator[list[tuple[set[int], int]]]:
    """The units of keys that each head chooses, and how many there are; block by block."""
    method, protocol = parse_spec(spec).method, Protocol.parse(f"prefill:{rows}")
    assert isinstance(method, BlockMethod)
    states = States(method, unit, protocol)
    for block in unit.blocks(0, 1, rows):
        for served in states.serve(block):
            (selection,) = select(method, served, served.block, [k])
            assert selection.choice is not None
            for own in selection.choice.chosen.movedim(1, 0):
                yield [(set(marks.nonzero()[:, 0].tolist()), len(marks)) for marks in own]


def _count(found: Compared, ours: set[int], formula: Choice, units: int) -> None:
    """Add one head's block of queries."""
    undecided = formula.possible - formula.sure
    apart = ours ^ formula.chosen
    found.pairs += units
    found.chosen += len(ours)
    found.undecided += len(undecided)
    found.rounded += len(apart & undecided)
    found.different += len(apart - undecided)


def main() -> None:
    """Compare, print the page, and fail where something differs."""
    arguments = _arguments()
    trace = open_trace(arguments.trace)
    layers = [int(layer) for layer in arguments.layers.split(",")]
    length = trace.length(trace.sequences[0])
    asked: list[tuple[str, int, int, Formula]] = [
        ("xattention", length, 128, partial(xattention, block=128, stride=8)),
        (
            "minference:pattern=vertical-slash",
            512,
            64,
            partial(vertical_slash, k=512, columns=0.141, last=64),
        ),
        ("flexprefill", length, 128, partial(flexprefill, block=128)),
        ("flexprefill:tau=0.5", length, 128, partial(flexprefill, block=128, tau=0.5)),
    ]
    lines = [
        origin(),
        "",
        f"Layers {arguments.layers}, all heads, {length:,} tokens. Undecided: float32 may round "
        f"sums of attention by {ROUNDING:g} of them.",
        "",
        "| method | top-k | pairs compared | chosen | undecided | differing by rounding | others |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    wrong = 0
    for spec, k, rows, formula in asked:
        found = compare(spec, k, rows, formula, trace, layers)
        wrong += found.different
        lines.append(
            f"| `{spec}` | {k:,} | {found.pairs:,} | {found.chosen:,} | {found.undecided:,} "
            f"| {found.rounded:,} | {found.different:,} |"
        )
    publish("\n".join(lines), arguments.out)
    sys.exit(1 if wrong else 0)


def _arguments() -> argparse.Namespace:
    arguments: Any = parser(__doc__)
    arguments.add_argument("--trace", required=True)
    arguments.add_argument("--layers", default="2,12,22")
    return arguments.parse_args()


if __name__ == "__main__":
    main()
