"""95 % intervals over sequences that a page shows: of every method's means over layers and heads,
of each layer and, where they are few, of each head; and of the differences between two methods."""

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from retrace.analyze.metrics.registry import WITH_INTERVAL
from retrace.analyze.outputs.report.packed import Packed
from retrace.analyze.tables.figures import Figures
from retrace.analyze.tables.intervals import HEAD, OVER, differences, intervals

Ends = dict[str, dict[str, list[float]]]
"""The interval [low, high], by metric and budget."""

Places = dict[str, dict[str, dict[str, int]]]
"""Where the intervals of a method are, by metric and budget."""

GROUP = ["method", "metric", "topk"]
HEADS = 10_000
"""Most figures of heads, of all methods and budgets, that have intervals: a matter of seconds."""
BITS = 15
"""Of an end's mantissa: four decimals are shown."""
ROWS = 500_000
"""Rows of sequences that pairs of methods are compared over at once."""


def intervals_of(results: Figures) -> tuple[dict[str, Ends], dict[str, dict[str, Ends]]]:
    """Intervals by method, and those of a method's figures less an earlier method's, by both.

    None where they take more sequences than there are. Drawn from the same sequences for both, so
    that what makes a sequence hard for both cancels.
    """
    rows = _joined_heads(results.sequences, "model")
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


def ends_within(
    results: Figures, layers: list[int], heads: int, packed: Packed
) -> dict[str, Places]:
    """The places of the intervals of every layer's mean and, unless they are too many, of every
    head: grids (2, layers) and (2, layers, heads) of low and high ends, NaN where there is none."""
    rows = results.sequences[results.sequences["metric"].isin(WITH_INTERVAL)]
    places: dict[str, Places] = {"layer": {}, "head": {}}
    if rows["sequence"].nunique() > 1:
        places["layer"] = _places(_joined_heads(rows, "layer"), "layer", layers, 1, packed)
        if len(rows[[*GROUP, "layer", "head"]].drop_duplicates()) <= HEADS:
            places["head"] = _places(rows, "head", layers, heads, packed)
    return places


def _places(rows: pd.DataFrame, over: str, layers: list[int], heads: int, packed: Packed) -> Places:
    known = intervals(rows, GROUP, over).dropna(subset=["low", "high"])
    places: Places = {}
    key: Any
    for key, part in known.groupby(GROUP, sort=False, observed=True):
        method, metric, k = key
        ends = np.full((2, len(layers), heads), np.nan)
        at = np.searchsorted(layers, part["layer"]), part["head"] if over == "head" else 0
        ends[0][at], ends[1][at] = part["low"], part["high"]
        of_method = places.setdefault(str(method), {}).setdefault(str(metric), {})
        of_method[str(int(k))] = packed.add(ends, BITS)
    return places


def _joined_heads(rows: pd.DataFrame, over: str) -> pd.DataFrame:
    """Rows with all heads that a mean is over as one, where that is the same: where every sequence
    has all of them and they count the same queries, the mean over heads of their means over queries
    is the mean over queries of theirs over heads. Otherwise as they are."""
    rows = rows[rows["metric"].isin(WITH_INTERVAL)]
    heads = rows[HEAD].drop_duplicates()
    figures = rows.groupby([*GROUP, "sequence", *OVER[over]], sort=False, observed=True).agg(
        mean=("mean", "mean"),
        count=("count", "max"),
        least=("count", "min"),
        heads=("count", "size"),
    )
    figures = figures.reset_index()
    all_heads: Any = len(heads)
    if over == "layer":
        all_heads = figures["layer"].map(heads["layer"].value_counts())
    if not ((figures["heads"] == all_heads) & (figures["count"] == figures["least"])).all():
        return rows
    one: dict[str, Any] = {"layer": 0, "module": "", "head": 0}
    joined = {name: one[name] for name in HEAD if name not in OVER[over]}
    return figures.drop(columns=["least", "heads"]).assign(**joined)


def _ends(rows: pd.DataFrame) -> Ends:
    ends: Ends = {}
    rows = rows.dropna(subset=["low", "high"])
    columns = (rows[name] for name in ("metric", "topk", "low", "high"))
    for metric, k, low, high in zip(*columns, strict=True):
        ends.setdefault(str(metric), {})[str(k)] = [float(f"{low:.6g}"), float(f"{high:.6g}")]
    return ends
