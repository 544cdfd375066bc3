"""Whether keys can be followed from query to query: of each position, and query by query."""

from collections.abc import Sequence

import numpy as np

from retrace.analyze.methods.specs import MethodSpec
from retrace.analyze.replay.settings import Settings
from retrace.analyze.replay.spans import counted_positions
from retrace.traces import RetraceError


def check_followed(settings: Settings, specs: Sequence[MethodSpec], budgets: Sequence[int]) -> None:
    """Refuse to follow the keys of queries that do not come one after another.

    Raises:
        RetraceError: blocks of queries share their keys, a position among those that count has no
            query in the trace, or no sequence has two that count.
    """
    trace, counting = settings.trace, settings.counting
    if counting.protocol.block is not None:
        raise RetraceError(
            f"--locality follows keys from query to query, and under {counting.protocol} the "
            f"queries of a block share those that {_names(specs)} chose: give another --protocol."
        )
    most = 0
    for sequence in settings.sequences:
        first = min(counting.first(k, trace.length(sequence)) for k in budgets)
        counted = counted_positions(trace, counting.where, sequence, first)
        [gaps] = np.nonzero(np.diff(counted) != 1)
        if len(gaps):
            raise RetraceError(
                f"--locality takes a query of every position: of sequence {sequence}, "
                f"{_whose(settings)} has one of {counted[gaps[0]]} and the next of "
                f"{counted[gaps[0] + 1]}. From {counted[gaps[-1] + 1]} on it has all, for "
                "--min-context; `capture --queries all` keeps them."
            )
        most = max(most, len(counted))
    if most < 2:
        raise RetraceError(
            "--locality takes two queries that count, one after another, and no sequence has them: "
            "lower the least position with --min-context."
        )


def _whose(settings: Settings) -> str:
    """What has the queries that count."""
    where = settings.counting.where
    return str(settings.trace.path) if where is None else f"--where {where}"


def _names(specs: Sequence[MethodSpec]) -> str:
    return " or ".join(map(str, specs))
