"""Marks: named spans of a sequence's positions, such as the evidence that answers its question."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from retrace.traces.errors import RetraceError

Marks = Mapping[str, Sequence[range]]
"""Spans of positions by name, those of one name ascending and apart from each other."""

MARK_AXES = ("sequence", "mark", "bound")
"""Axes of the array `marks`, int32: of each mark the number of its name, its first position and the
one after its last; -1 where a sequence has fewer. The names are in the array's attributes."""
NAME = re.compile(r"[A-Za-z][\w.-]{0,63}")
MOST_NAMES = 256


def joined_spans(spans: Sequence[range]) -> tuple[range, ...]:
    """Spans of positions, ascending, those that overlap or touch as one.

    >>> joined_spans([range(5, 9), range(0, 2), range(7, 12), range(3, 3)])
    (range(0, 2), range(5, 12))
    """
    joined: list[range] = []
    for span in sorted((s for s in spans if len(s)), key=lambda s: (s.start, s.stop)):
        if joined and span.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return tuple(joined)


def check_marks(marks: Marks, length: int) -> None:
    """Refuse marks that a sequence of `length` positions cannot have.

    Raises:
        RetraceError: a name is none, or a span is empty, not inside, or not after the one before.
    """
    check_names(tuple(marks))
    for name, spans in marks.items():
        end = 0
        for span in spans:
            if span.step != 1 or not end <= span.start < span.stop <= length:
                raise RetraceError(
                    f"The mark {name} has a span from {span.start} to {span.stop}: spans ascend, "
                    f"do not overlap, hold a position and end by {length}."
                )
            end = span.stop


def check_names(names: Sequence[Any]) -> None:
    """Refuse what are no names of marks.

    Raises:
        RetraceError: says which.
    """
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise RetraceError(
                f"{str(name)[:80]!r} is no name of a mark: a letter, then up to 63 letters, "
                "digits, '_', '.' and '-'."
            )
    if len(set(names)) < len(names) or len(names) > MOST_NAMES:
        raise RetraceError(f"Marks have up to {MOST_NAMES} names, each of its own.")


def encoded_marks(marks: Sequence[Marks]) -> tuple[list[str], list[npt.NDArray[np.int32]]]:
    """The names of all sequences' marks, and each sequence's rows (marks, 3) of the array."""
    names = list(dict.fromkeys(name for one in marks for name, spans in one.items() if spans))
    rows = [
        np.array(
            [
                (names.index(name), span.start, span.stop)
                for name, spans in one.items()
                for span in spans
            ],
            np.int32,
        ).reshape(-1, 3)
        for one in marks
    ]
    return names, rows


def decoded_marks(
    rows: npt.NDArray[np.int32], names: Sequence[str], length: int
) -> dict[str, tuple[range, ...]]:
    """A sequence's marks from its rows (marks, 3), whoever wrote them.

    Raises:
        RetraceError: they are none of a sequence of `length` positions.
    """
    there = rows[:, 0] >= 0
    count = int(there.sum())
    unknown = (rows[:count, 0] >= len(names)).any()
    if not there[:count].all() or (rows[count:] != -1).any() or unknown:
        raise RetraceError("Rows of marks name no mark of the trace.")
    marks: dict[str, list[range]] = {}
    for name, start, stop in rows[:count].tolist():
        marks.setdefault(names[name], []).append(range(start, stop))
    check_marks(marks, length)
    return {name: tuple(spans) for name, spans in marks.items()}
