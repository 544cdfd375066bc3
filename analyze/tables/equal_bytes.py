"""Figures where methods read the same share of full attention's bytes.

A method is measured at budgets. Between two of them, that read shares a and b of full attention's
bytes, a figure at the share x is read off the straight line through both:

    f(x) = (1 - w) f_a + w f_b,   w = (x - a) / (b - a)

Nothing is said of a share below or above all that were measured. Bytes need not grow with the
budget (a method may keep whole pages, or as many keys as a threshold takes): the budgets are then
the last one that reads no more than x, and the next.

The bytes differ from sequence to sequence as the figure does. To the first order a sequence adds to
f(x) what it adds to

    (1 - w) f_a + w f_b - (f_b - f_a) / (b - a) ((1 - w) a + w b - x),

of which the mean over sequences is f(x). These stand in place of a sequence's figures, so intervals
and paired differences are those of `retrace.analyze.tables.intervals`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from retrace.analyze.tables.intervals import (
    FIGURES,
    HEAD,
    check_same_queries,
    differences,
    intervals,
)
from retrace.traces import RetraceError

BYTES = "bytes_ratio"
PLACE = [*HEAD, "sequence"]
ROUNDING = 1e-6
"""Shares that differ by no more are the same: figures of sequences are kept in float32."""


class Between(NamedTuple):
    """Where a share of the bytes lies among a method's budgets."""

    low: int
    """The budget that reads no more."""
    high: int
    """The next; the same where that one reads just as much."""
    weight: float
    """Of the second, from 0 to 1."""
    step: float
    """What the second reads more."""

    @property
    def topk(self) -> float:
        """The budget in between."""
        return (1 - self.weight) * self.low + self.weight * self.high


def reads(rows: pd.DataFrame) -> "pd.Series[float]":
    """The share of full attention's bytes that a method reads at each budget, ascending: means over
    heads and layers of their means over queries.

    Args:
        rows: those of `Results.sequences` of one method.
    """
    rows = rows[rows["metric"] == BYTES]
    rows = rows.assign(total=rows["mean"].astype(np.float64) * rows["count"])
    sums = rows.groupby(["topk", *HEAD])[["total", "count"]].sum()
    heads = (sums["total"] / sums["count"]).reset_index()
    heads.columns = pd.Index(["topk", *HEAD, "share"])
    return heads.groupby("topk")["share"].mean().sort_index()


def between(read: "pd.Series[float]", share: float) -> Between | None:
    """The budgets around a share; None if all read more, or the largest reads less."""
    budgets = [int(k) for k in read.index]
    over = read.to_numpy(np.float64) - share
    over[np.abs(over) <= ROUNDING] = 0.0
    within = np.flatnonzero(over <= 0)
    if not len(within):
        return None
    at = int(within[-1])
    if over[at] == 0:
        return Between(budgets[at], budgets[at], 0.0, 0.0)
    if at + 1 == len(budgets):
        return None
    step = over[at + 1] - over[at]
    return Between(budgets[at], budgets[at + 1], float(-over[at] / step), float(step))


def read_off(
    rows: pd.DataFrame, place: Between, share: float, metrics: Sequence[str]
) -> pd.DataFrame:
    """Rows as `Results.sequences` has them, of what each sequence adds to the figures at a share.

    Args:
        rows: those of one method.
        place: where the share lies among its budgets.
        share: of full attention's bytes.
        metrics: names of metrics.

    Raises:
        RetraceError: the two budgets were judged on different queries.
    """
    keys = ["metric", *PLACE]
    rows = rows[rows["metric"].isin([BYTES, *metrics])]
    low, high = (rows[rows["topk"] == k].set_index(keys) for k in (place.low, place.high))
    # In any order, the same queries.
    if not low["count"].sort_index().equals(high["count"].sort_index()):
        raise RetraceError(
            f"{rows['method'].iloc[0]} was judged on other queries at top-k {place.low} than at "
            f"{place.high}, so nothing can be read off between them: analyze it anew, without "
            "--min-context each."
        )
    first = low["mean"].astype(np.float64)
    second = high["mean"].astype(np.float64).reindex(low.index)
    values = (1 - place.weight) * first + place.weight * second
    table = low.assign(mean=values).reset_index()
    if place.step > 0:
        heads = (second - first).reset_index(name="step").merge(low["count"].reset_index(), on=keys)
        heads["step"] *= heads["count"]
        sums = heads.groupby(["metric", *HEAD])[["step", "count"]].sum()
        slopes = (sums["step"] / sums["count"]).groupby("metric").mean() / place.step
        beyond: Any = values.loc[BYTES] - share
        at = pd.MultiIndex.from_frame(table[PLACE])
        table["mean"] -= table["metric"].map(slopes).to_numpy() * beyond.reindex(at).to_numpy()
    return table[table["metric"].isin(list(metrics))].assign(topk=place.topk, share=share)


def same_places(rows: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The rows of layers of sequences that the others have too."""
    places = other[["layer", "sequence"]].drop_duplicates()
    return rows.merge(places, on=["layer", "sequence"])


COLUMNS = ["share", "method", "topk", "metric", *FIGURES, "least", "most"]


def figures_at(
    sequences: pd.DataFrame,
    methods: Sequence[str],
    shares: Sequence[float],
    against: str | None,
    metrics: Sequence[str],
) -> pd.DataFrame:
    """Figures of methods at shares of the bytes, as `Results.at_bytes` has them.

    Args:
        sequences: `Results.sequences`.
        methods: what the figures are of.
        shares: of full attention's bytes.
        against: the method whose figures are taken off, if any.
        metrics: names of metrics.
    """
    of = {m: sequences[sequences["method"] == m] for m in {*methods, *filter(None, [against])}}
    for method, rows in of.items():
        if not (rows["metric"] == BYTES).any():
            there = ", ".join(sequences["method"].unique()) or "none"
            raise RetraceError(
                f"{method} has no figures per sequence here, which bytes are read off; there are: "
                f"{there}."
            )
    pieces = []
    for share in shares:
        if not share > 0:
            raise RetraceError(f"A share of the bytes is above 0, such as 0.125: not {share}.")
        for method in methods:
            rows, other = of[method], None if against is None else of[against]
            read = reads(rows)
            found = _at(rows, other, share, metrics)
            pieces.append(
                found.assign(share=share, method=method, least=read.min(), most=read.max())
            )
    table = pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame(columns=COLUMNS)
    return table[COLUMNS]


def _at(
    rows: pd.DataFrame, other: pd.DataFrame | None, share: float, metrics: Sequence[str]
) -> pd.DataFrame:
    """A method's figures at one share, or what they are more than another's."""
    if other is not None:
        rows, other = same_places(rows, other), same_places(other, rows)
    places = [between(reads(side), share) for side in (rows, other) if side is not None]
    place = places[0]
    if place is None or places[-1] is None:
        nothing = {"mean": np.nan, "low": np.nan, "high": np.nan, "sequences": 0}
        return pd.DataFrame({"metric": list(metrics), "topk": np.nan, **nothing})
    by = ["share", "metric"]
    found = read_off(rows, place, share, metrics)
    if other is None:
        table = intervals(found, by, "model")
    else:
        theirs = read_off(other, places[-1], share, metrics).assign(topk=place.topk)
        names = [str(side["method"].iloc[0]) for side in (rows, other)]
        check_same_queries(found, theirs, " and ".join(names))
        table = differences(found, theirs, by, "model")
    return table.assign(topk=place.topk)
