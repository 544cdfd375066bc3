"""Spans of a sequence's positions by name: what the trace marks there, or the phase they have."""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from retrace.traces import PHASES, RetraceError, Trace

Spans = tuple[range, ...]
"""Spans of positions, ascending and apart from each other."""
EVIDENCE = "evidence"
"""The mark that figures are told for unless another is named."""


def spans_named(trace: Trace, name: str, sequence: int) -> Spans:
    """The positions of a sequence that a mark of this name holds, or that have this phase."""
    if name not in PHASES:
        return trace.marks(sequence).get(name, ())
    inside = trace.phase(sequence) == PHASES[name]
    edges = np.flatnonzero(np.diff(inside.astype(np.int8), prepend=0, append=0)).tolist()
    return tuple(map(range, edges[::2], edges[1::2]))


def check_name(trace: Trace, name: str, option: str) -> None:
    """Refuse the name of no mark or phase of any finished sequence, which an option was given.

    Raises:
        RetraceError: there is none, or both a mark and a phase; names those that there are.
    """
    if name in PHASES and name in trace.mark_names:
        raise RetraceError(
            f"{option} {name}: {trace.path} has a mark of that name, which is a phase's too: "
            "capture it with another name of the mark."
        )
    known = [*PHASES, *trace.mark_names]
    there = [n for n in known if any(spans_named(trace, n, s) for s in trace.sequences)]
    if name not in there:
        raise RetraceError(
            f"{option} {name}: no sequence of {trace.path} has it; there are {', '.join(there)}."
        )


def rows_within(positions: Sequence[int], spans: Spans, first: int) -> list[slice]:
    """The rows of ascending query positions that are in some span and not before the position
    `first`: as few slices as hold them, none of them empty."""
    slices: list[slice] = []
    for span in spans:
        start, stop = (bisect_left(positions, max(at, first)) for at in (span.start, span.stop))
        if slices and slices[-1].stop == start < stop:
            slices[-1] = slice(slices[-1].start, stop)
        elif start < stop:
            slices.append(slice(start, stop))
    return slices


def counted_positions(
    trace: Trace, where: str | None, sequence: int, first: int
) -> npt.NDArray[np.int32]:
    """The positions (queries,) of a sequence's queries that count from `first` on, ascending: of
    all that the trace has, or of those in the spans named `where`."""
    positions = trace.query_positions(sequence)
    if where is None:
        return positions[positions >= first]
    spans = spans_named(trace, where, sequence)
    rows = rows_within(positions.tolist(), spans, first)
    return np.concatenate([positions[:0], *(positions[part] for part in rows)])
