"""Intervals of figures, over sequences: queries of one sequence are not independent.

A figure of a head is the mean over its counted queries, so that a sequence weighs as many as it
has; of several heads, the mean of theirs. With m_sh the mean of sequence s and head h, w_sh its
share of the head's queries and f_h = sum_s w_sh m_sh, the figure is the mean of f_h over heads.

Sequences are taken as drawn from all that there could be, their means spread alike however long
they are. With W_s the mean over heads of w_sh, and d_s that of w_sh (m_sh - f_h), over W_s,

    e^2 = sum_s W_s d_s^2 * sum_s W_s^2 / (1 - sum_s W_s^2)

is the square of the figure's standard error: for n sequences of equal length s^2 / n. The interval
is the figure and c e to both sides, where c is Student's factor for n' - 1 degrees of freedom,
times 1 + min(0.9, 4 / n'); n' = 1 / sum_s W_s^2 is n, or less where some sequences weigh more.
Student's interval alone is right for means that are normal. Of skewed ones it holds fewer than it
says: of 5 exponential ones (skewness 2) 88 in 100. The last factor makes up for that, by
simulation: for means as skewed as exponential ones the interval holds in at least 95 of 100 cases,
and in 97 to 99 for normal ones. What is more skewed (one sequence in many unlike all others) it
holds less often: of means like exp(z), z standard normal, in 90 to 94.

An interval ends where a figure's range does: shares are 0 to 1, other figures 0 or more, and
differences of shares -1 to 1. What is cut off is nothing that the figure can be, so it holds as
often as before.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

from retrace.analyze.metrics.possible import end_of
from retrace.traces import RetraceError

Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95
WIDER, MOST_WIDER = 4.0, 0.9
"""How much wider than Student's an interval is, of one sequence, and at the most."""
LEAST = 1.5
"""Sequences of equal weight that an interval takes: of fewer, one sequence outweighs all others."""
OVER = {"model": [], "layer": ["layer", "module"], "head": ["layer", "module", "head"]}
"""Columns that say what a mean is of, by what it is over: all layers and heads, a layer's heads, or
the queries of one head only."""
HEAD = OVER["head"]
FIGURES = ["mean", "low", "high", "sequences"]


def intervals(rows: pd.DataFrame, by: list[str], over: str) -> pd.DataFrame:
    """Figures with their intervals.

    Args:
        rows: those of `Results.sequences`.
        by: columns of which each group of rows has figures of its own, `metric` among them.
        over: a key of `OVER`.

    Returns:
        `by`, the columns that `OVER` names, and `FIGURES`: `sequences` says how many those are
        over, and of one sequence `low` and `high` are NaN.
    """
    pieces = []
    for piece in _pieces(rows, by):
        samples = _Samples(piece, by, over)
        pieces.append(_tabulated(samples, samples.figures, samples.parts))
    return _within_range(_joined(pieces, by, over), lambda end: 0.0)


def differences(rows: pd.DataFrame, other: pd.DataFrame, by: list[str], over: str) -> pd.DataFrame:
    """The same of the figures of `rows` less those of `other`, over the sequences and heads that
    both have. They are taken sequence by sequence, so that what makes one hard for both cancels."""
    keys = [*by, "sequence", *HEAD]
    both = rows.merge(other[[*keys, "mean", "count"]], on=keys, suffixes=("", "_other"))
    pieces = []
    for piece in _pieces(both, by):
        ours = _Samples(piece, by, over)
        theirs = _Samples(
            piece.assign(mean=piece["mean_other"], count=piece["count_other"]), by, over
        )
        figures, parts = ours.figures - theirs.figures, ours.parts - theirs.parts
        pieces.append(_tabulated(ours, figures, parts))
    return _within_range(_joined(pieces, by, over), lambda end: -end)


def check_same_queries(ours: pd.DataFrame, theirs: pd.DataFrame, names: str) -> None:
    """Refuse to compare figures of other queries, where both have some."""
    keys = ["layer", "head", "sequence", "topk", "metric"]
    both = ours.merge(theirs, on=keys, suffixes=("", "_other"))
    unlike = both[both["count"] != both["count_other"]]
    if len(unlike):
        first = unlike.iloc[0]
        raise RetraceError(
            f"{names} did not answer the same queries: {first['metric']} at top-k {first['topk']} "
            f"is over {first['count']} and {first['count_other']} in sequence {first['sequence']}, "
            f"layer {first['layer']}, head {first['head']}. Choose other metrics, or analyze anew."
        )


def interval_of_mean(totals: Array, counts: Array) -> tuple[float, float]:
    """The interval of a mean of which each sequence has a total and a count (sequences,)."""
    shares = (counts / counts.sum())[:, None]
    mean = totals.sum() / counts.sum()
    parts = (totals - mean * counts)[:, None] / counts.sum()
    low, high = _ends(np.array([mean]), shares, parts)
    return float(low[0]), float(high[0])


def _pieces(rows: pd.DataFrame, by: list[str]) -> Iterator[pd.DataFrame]:
    """Rows of groups that are over the same sequences. Their column `group` says where a group
    was."""
    rows = rows.assign(group=rows.groupby(by, sort=False).ngroup())
    present = rows[["group", "sequence"]].drop_duplicates().sort_values(["group", "sequence"])
    sequences = present.groupby("group")["sequence"].agg(tuple)
    for _, alike in sequences.groupby(sequences, sort=False):
        yield rows[rows["group"].isin(alike.index)]


class _Samples:
    """What several groups come to, sequence by sequence. Each of `names` has a figure."""

    def __init__(self, rows: pd.DataFrame, by: list[str], over: str) -> None:
        figure = ["group", *by, *OVER[over]]
        heads = rows[["group", *by, *HEAD]].drop_duplicates()
        place = heads.groupby(figure, sort=False).ngroup().to_numpy(np.int64)
        self.names = heads[figure].drop_duplicates(ignore_index=True)
        sequences, row = np.unique(rows["sequence"], return_inverse=True)
        column = rows.groupby(["group", *HEAD], sort=False).ngroup()
        self.sequences = len(sequences)
        counts = np.zeros((self.sequences, len(heads)))
        means = np.zeros_like(counts)
        counts[row, column] = rows["count"]
        means[row, column] = rows["mean"]
        total = counts.sum(axis=0)
        shares = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
        figures = (shares * means).sum(axis=0)
        # Heads of one figure side by side.
        order = np.argsort(place, kind="stable")
        first = np.unique(place[order], return_index=True)[1]
        known = np.add.reduceat((total > 0)[order].astype(np.float64), first)

        def over_heads(of: Array) -> Array:
            """Means (..., figures) over the heads that have any query."""
            with np.errstate(invalid="ignore"):
                return np.add.reduceat(of[..., order], first, axis=-1) / known

        self.figures = over_heads(figures)
        """(figures,)"""
        self.shares = over_heads(shares)
        """Of each sequence (sequences, figures)."""
        self.parts = over_heads(shares * (means - figures))
        """What each sequence adds to the figure, less what it would as their mean."""


def _tabulated(samples: _Samples, figures: Array, parts: Array) -> pd.DataFrame:
    """Figures, by name, with their intervals."""
    low, high = _ends(figures, samples.shares, parts)
    return samples.names.assign(mean=figures, low=low, high=high, sequences=samples.sequences)


def _within_range(table: pd.DataFrame, begin: Callable[[float], float]) -> pd.DataFrame:
    """The table with intervals cut to what each metric can be, where `begin` says the least by the
    most; never so that the figure, which rounding may put beyond, is outside."""
    most = table["metric"].map(end_of).to_numpy(np.float64)
    least = table["metric"].map(lambda metric: begin(end_of(metric))).to_numpy(np.float64)
    mean, low, high = (table[name].to_numpy(np.float64) for name in ("mean", "low", "high"))
    return table.assign(
        low=np.maximum(low, np.minimum(least, mean)), high=np.minimum(high, np.maximum(most, mean))
    )


def _joined(pieces: list[pd.DataFrame], by: list[str], over: str) -> pd.DataFrame:
    """One table, groups in the order in which they came."""
    columns = [*by, *OVER[over], *FIGURES]
    if not pieces:
        return pd.DataFrame(columns=columns)
    table = pd.concat(pieces, ignore_index=True)
    return table.sort_values("group", kind="stable", ignore_index=True)[columns]


def _ends(figures: Array, shares: Array, parts: Array) -> tuple[Array, Array]:
    """The ends of the intervals of figures (figures,), by the shares of the sequences and what they
    add (sequences, figures); NaN where sequences are too few."""
    from scipy import stats  # takes a second to import, which workers can spare

    held = (shares**2).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.divide(parts**2, shares, out=np.zeros_like(parts), where=shares > 0).sum(axis=0)
        error = np.sqrt(apart * held / (1 - held))
        alike = 1 / held
        reach = stats.t.ppf((1 + CONFIDENCE) / 2, alike - 1)
        reach *= 1 + np.minimum(MOST_WIDER, WIDER / alike)
        wide = np.where(alike >= LEAST, reach * error, np.nan)
    return figures - wide, figures + wide
