"""Intervals of figures, over sequences: queries of one sequence are not independent.

A figure of a head is the mean over its counted queries, so that a sequence weighs as many as it
has; of several heads, the mean of theirs. With m_sh the mean and n_sh the count of sequence s and
head h, and w_s how often s is drawn,

    figure(w) = mean over h of (sum_s w_s n_sh m_sh / sum_s w_s n_sh)

which for w = 1 is what the tables hold. The interval is the percentile bootstrap's: whole sequences
are drawn with replacement, as many as there are. Of few sequences that interval is too narrow, so
that its percentiles are moved out to where they would be right for a mean of normal figures: the
expanded percentile interval of Hesterberg, What Teachers Should Know About the Bootstrap
(arXiv:1411.5279). It never leaves the range of the sequences' own figures. Of fewer
than `ENOUGH` sequences that range itself holds the truth less often than in 95 of 100 cases.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

Array = npt.NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
ENOUGH = 6
"""Sequences of which the range holds a median in 95 of 100 cases: 1 - 2 / 2^6 = 0.97."""
OVER = {"model": [], "layer": ["layer", "module"], "head": ["layer", "module", "head"]}
"""Columns that say what a mean is of, by what it is over: all layers and heads, a layer's heads, or
the queries of one head only."""
HEAD = OVER["head"]


class Figures(NamedTuple):
    """Some figures (figures,), and the interval of each; NaN where there is one sequence."""

    mean: Array
    low: Array
    high: Array


class Samples:
    """What one method comes to by one metric at one budget, sequence by sequence.

    `rows` are those of `Results.sequences`; `over` is a key of `OVER`.
    """

    def __init__(self, rows: pd.DataFrame, over: str) -> None:
        table = rows.pivot(index="sequence", columns=HEAD, values=["mean", "count"])
        self.sequences: list[int] = [int(s) for s in table.index]
        self.heads = table["count"].columns.to_frame(index=False)
        self._place = np.zeros(len(self.heads), np.int64)
        self.names = pd.DataFrame(index=[0])
        if OVER[over]:
            labelled = self.heads.groupby(OVER[over], sort=False)
            self._place = labelled.ngroup().to_numpy(np.int64)
            self.names = self.heads[OVER[over]].drop_duplicates(ignore_index=True)
        count = table["count"].fillna(0).to_numpy(np.float64)
        total = table["mean"].fillna(0).to_numpy(np.float64) * count
        self._totals, self._counts = self._joined(total, count)

    def _joined(self, totals: Array, counts: Array) -> tuple[Array, Array]:
        """Heads that count the same queries, and whose mean is asked for, as one: the mean of
        their ratios is the ratio of their means."""
        first = np.unique(self._place, return_index=True)[1]
        if not np.array_equal(counts, counts[:, first][:, self._place]):
            return totals, counts
        share = np.eye(len(first))[self._place]
        share /= share.sum(axis=0)
        self._place = np.arange(len(first))
        return totals @ share, counts[:, first]

    def means(self, weights: Array) -> Array:
        """The figures (figures, ...) when sequences have these weights (..., sequences)."""
        counts = weights @ self._counts
        ratios = np.divide(
            weights @ self._totals, counts, out=np.zeros_like(counts), where=counts > 0
        )
        share = np.eye(self._place.max() + 1)[self._place]
        with np.errstate(invalid="ignore"):
            return np.moveaxis((ratios @ share) / ((counts > 0) @ share), -1, 0)


def figures(rows: pd.DataFrame, over: str) -> tuple[pd.DataFrame, Figures, int]:
    """The figures of one method, metric and budget, from rows of `Results.sequences`.

    Returns what each is of (the columns that `OVER` names), the figures, and how many sequences
    they are over.
    """
    samples = Samples(rows, over)
    return samples.names, _bootstrap(samples.means, n := len(samples.sequences)), n


def differences(
    rows: pd.DataFrame, other: pd.DataFrame, over: str
) -> tuple[pd.DataFrame, Figures, int]:
    """The same of the figures of `rows` less those of `other`, over the sequences and heads that
    both have. Both are drawn together, so that what makes a sequence hard for both cancels."""
    keys = ["sequence", *HEAD]
    shared = rows[keys].merge(other[keys])
    ours, theirs = (Samples(side.merge(shared), over) for side in (rows, other))
    n = len(ours.sequences)
    return ours.names, _bootstrap(lambda w: ours.means(w) - theirs.means(w), n), n


def _bootstrap(statistic: Callable[[Array], Array], sequences: int) -> Figures:
    """A statistic of the weights of sequences (..., sequences), with its interval."""
    mean = statistic(np.ones(sequences))
    if sequences < 2:
        return Figures(mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan))

    def drawn(indices: npt.NDArray[np.int64], axis: int) -> Array:
        return statistic(_times_drawn(indices, sequences))

    with warnings.catch_warnings():
        # Where a layer lacks a sequence, some draws have none at all: no interval, as NaN says.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (np.arange(sequences),),
            drawn,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=1_000,
            confidence_level=_expanded(sequences),
            method="percentile",
            rng=np.random.default_rng(0),
        )
    low, high = (np.asarray(bound, np.float64) for bound in found.confidence_interval)
    return Figures(mean, low, high)


def _times_drawn(indices: npt.NDArray[np.int64], sequences: int) -> Array:
    """How often each sequence is among those drawn: (resamples, sequences) from indices
    (resamples, draws)."""
    resamples = len(indices)
    flat = indices + sequences * np.arange(resamples)[:, None]
    counts = np.bincount(flat.ravel(), minlength=resamples * sequences)
    return counts.reshape(resamples, sequences).astype(np.float64)


def _expanded(sequences: int) -> float:
    """The level at which the percentile interval of a normal mean is as wide as Student's."""
    n = sequences
    reach = np.sqrt(n / (n - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    return float(min(1 - 2 * stats.norm.cdf(-reach), 1 - 1e-9))


def tabulated(
    groups: list[tuple[dict[str, Any], tuple[pd.DataFrame, Figures, int]]], columns: list[str]
) -> pd.DataFrame:
    """One table of several figures, each with labels of its own."""
    frames = [
        names.assign(**labels, **found._asdict(), sequences=count)
        for labels, (names, found, count) in groups
    ]
    if not frames:
        return pd.DataFrame(columns=columns)
    return pd.concat(frames, ignore_index=True)[columns]
