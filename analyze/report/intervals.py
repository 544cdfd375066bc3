"""95 % intervals over sequences that a page shows: of every method's means over layers and heads,
and of the differences between any two methods of one run."""

from itertools import combinations

import pandas as pd

from retrace.analyze.intervals import differences, intervals
from retrace.analyze.results import WITH_INTERVAL, Results

Ends = dict[str, dict[str, list[float]]]
"""The interval [low, high], by metric and budget."""

ROWS = 500_000
"""Rows of sequences that pairs of methods are compared over at once."""


def intervals_of(results: Results) -> tuple[dict[str, Ends], dict[str, dict[str, Ends]]]:
    """Intervals by method, and those of a method's figures less an earlier method's, by both.

    None where they take more sequences than there are. Drawn from the same sequences for both, so
    that what makes a sequence hard for both cancels.
    """
    rows = _joined_heads(results.sequences)
    if rows["sequence"].nunique() < 2:
        return {}, {}
    means = intervals(rows, ["method", "topk", "metric"], "model")
    known = {str(method): _ends(part) for method, part in means.groupby("method", sort=False)}
    pairs: dict[str, dict[str, Ends]] = {}
    of = {str(method): part for method, part in rows.groupby("method", sort=False, observed=True)}
    # Many pairs at once, as one draw serves them all; few where every head is a row.
    both = list(combinations(known, 2))
    step = max(1, ROWS * len(known) // len(rows))
    for some in (both[first : first + step] for first in range(0, len(both), step)):
        ours, theirs = (
            pd.concat([of[pair[side]].assign(pair=i) for i, pair in enumerate(some)])
            for side in (1, 0)
        )
        less = differences(ours, theirs, ["pair", "topk", "metric"], "model")
        for i, part in less.groupby("pair"):
            other, method = some[int(str(i))]
            pairs.setdefault(method, {})[other] = _ends(part)
    return known, pairs


def _joined_heads(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with all heads of a sequence as one, where that is the same: where every sequence has
    all of them and they count the same queries, the mean over heads of their means over queries is
    the mean over queries of theirs over heads. Otherwise as they are."""
    rows = rows[rows["metric"].isin(WITH_INTERVAL)]
    heads = len(rows[["layer", "head"]].drop_duplicates())
    keys = ["method", "topk", "metric", "sequence"]
    figures = rows.groupby(keys, sort=False, observed=True).agg(
        mean=("mean", "mean"),
        count=("count", "max"),
        least=("count", "min"),
        heads=("count", "size"),
    )
    if not ((figures["heads"] == heads) & (figures["count"] == figures["least"])).all():
        return rows
    return figures.reset_index().drop(columns=["least", "heads"]).assign(layer=0, module="", head=0)


def _ends(rows: pd.DataFrame) -> Ends:
    ends: Ends = {}
    rows = rows.dropna(subset=["low", "high"])
    columns = (rows[name] for name in ("metric", "topk", "low", "high"))
    for metric, k, low, high in zip(*columns, strict=True):
        ends.setdefault(str(metric), {})[str(k)] = [float(f"{low:.6g}"), float(f"{high:.6g}")]
    return ends
