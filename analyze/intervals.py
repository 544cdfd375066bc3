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
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

Array = npt.NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
ENOUGH = 6
"""Sequences of which the range holds a median in 95 of 100 cases: 1 - 2 / 2^6 = 0.97."""
OVER = {"model": [], "layer": ["layer", "module"], "head": ["layer", "module", "head"]}
"""Columns that say what a mean is of, by what it is over: all layers and heads, a layer's heads, or
the queries of one head only."""
HEAD = OVER["head"]
FIGURES = ["mean", "low", "high", "sequences"]
AT_ONCE = 2_000
"""Heads whose figures are resampled in one piece: 160 MB of figures."""


def intervals(rows: pd.DataFrame, by: list[str], over: str) -> pd.DataFrame:
    """Figures with their intervals.

    Args:
        rows: those of `Results.sequences`.
        by: columns of which each group of rows has figures of its own.
        over: a key of `OVER`.

    Returns:
        `by`, the columns that `OVER` names, and `FIGURES`: `sequences` says how many those are
        over, and of one sequence `low` and `high` are NaN.
    """
    pieces = []
    for piece in _pieces(rows, by):
        samples = _Samples(piece, by, over)
        pieces.append(_tabulated(samples, samples.means))
    return _joined(pieces, by, over)


def differences(rows: pd.DataFrame, other: pd.DataFrame, by: list[str], over: str) -> pd.DataFrame:
    """The same of the figures of `rows` less those of `other`, over the sequences and heads that
    both have. Both are drawn together, so that what makes a sequence hard for both cancels."""
    keys = [*by, "sequence", *HEAD]
    both = rows.merge(other[[*keys, "mean", "count"]], on=keys, suffixes=("", "_other"))
    pieces = []
    for piece in _pieces(both, by):
        ours = _Samples(piece, by, over)
        theirs = _Samples(
            piece.assign(mean=piece["mean_other"], count=piece["count_other"]), by, over
        )

        def less(weights: Array, ours: _Samples = ours, theirs: _Samples = theirs) -> Array:
            return ours.means(weights) - theirs.means(weights)

        pieces.append(_tabulated(ours, less))
    return _joined(pieces, by, over)


def interval_of_mean(totals: Array, counts: Array) -> tuple[float, float]:
    """The interval of a mean of which each sequence has a total and a count (sequences,)."""
    low, high = _bootstrap(lambda w: (w @ totals / (w @ counts))[None], len(totals))
    return float(low[0]), float(high[0])


def _pieces(rows: pd.DataFrame, by: list[str]) -> Iterator[pd.DataFrame]:
    """Rows of groups that are over the same sequences, so that one draw serves them all: few
    enough at once. Their column `group` says where a group was."""
    rows = rows.assign(group=rows.groupby(by, sort=False).ngroup())
    present = rows[["group", "sequence"]].drop_duplicates().sort_values(["group", "sequence"])
    sequences = present.groupby("group")["sequence"].agg(tuple)
    heads = rows[["group", *HEAD]].drop_duplicates().groupby("group").size()
    for _, alike in heads.groupby(sequences, sort=False):
        for _, groups in alike.groupby(alike.cumsum() // AT_ONCE):
            yield rows[rows["group"].isin(groups.index)]


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
        # Heads of one figure side by side.
        order = np.argsort(place, kind="stable")
        self._first = np.unique(place[order], return_index=True)[1]
        self._counts = counts[:, order]
        self._totals = (means * counts)[:, order]
        self._join_heads()

    def _join_heads(self) -> None:
        """Heads that count the same queries, and whose mean is asked for, as one: the mean of
        their ratios is the ratio of their means."""
        heads = np.diff(self._first, append=self._counts.shape[1])
        counts = self._counts[:, self._first]
        if np.array_equal(self._counts, np.repeat(counts, heads, axis=1)):
            self._totals = np.add.reduceat(self._totals, self._first, axis=1) / heads
            self._counts = counts
            self._first = np.arange(len(heads))

    def means(self, weights: Array) -> Array:
        """The figures (figures, ...) when sequences have these weights (..., sequences)."""
        counts = weights @ self._counts
        drawn = counts > 0
        ratios = np.divide(weights @ self._totals, counts, out=np.zeros_like(counts), where=drawn)
        sums, heads = (
            np.add.reduceat(of, self._first, axis=-1) for of in (ratios, drawn.astype(np.float64))
        )
        with np.errstate(invalid="ignore"):
            return np.moveaxis(sums / heads, -1, 0)


def _tabulated(samples: _Samples, statistic: Callable[[Array], Array]) -> pd.DataFrame:
    """A statistic of weights, by name, with its intervals."""
    low, high = _bootstrap(statistic, samples.sequences)
    return samples.names.assign(
        mean=statistic(np.ones(samples.sequences)),
        low=low,
        high=high,
        sequences=samples.sequences,
    )


def _joined(pieces: list[pd.DataFrame], by: list[str], over: str) -> pd.DataFrame:
    """One table, groups in the order in which they came."""
    columns = [*by, *OVER[over], *FIGURES]
    if not pieces:
        return pd.DataFrame(columns=columns)
    table = pd.concat(pieces, ignore_index=True)
    return table.sort_values("group", kind="stable", ignore_index=True)[columns]


def _bootstrap(statistic: Callable[[Array], Array], sequences: int) -> tuple[Array, Array]:
    """The ends of the interval of a statistic (figures, ...) of the weights of sequences
    (..., sequences)."""
    if sequences < 2:
        none = np.full(len(statistic(np.ones(sequences))), np.nan)
        return none, none
    from scipy import stats  # takes a second to import, which workers can spare

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
    return low, high


def _times_drawn(indices: npt.NDArray[np.int64], sequences: int) -> Array:
    """How often each sequence is among those drawn: (resamples, sequences) from indices
    (resamples, draws)."""
    resamples = len(indices)
    flat = indices + sequences * np.arange(resamples)[:, None]
    counts = np.bincount(flat.ravel(), minlength=resamples * sequences)
    return counts.reshape(resamples, sequences).astype(np.float64)


def _expanded(sequences: int) -> float:
    """The level at which the percentile interval of a normal mean is as wide as Student's."""
    from scipy import stats

    n = sequences
    reach = np.sqrt(n / (n - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    return float(min(1 - 2 * stats.norm.cdf(-reach), 1 - 1e-9))
