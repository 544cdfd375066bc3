"""How keys move from query to query, in one table of words."""

from collections.abc import Sequence

import pandas as pd

from retrace.analyze.metrics.locality import FIGURES
from retrace.analyze.replay.counting import number_of

LOCALITY_TITLE = (
    "Keys from query to query (means over layers and groups, of the keys that any head of a group "
    "attends)"
)
ENOUGH = 0.9
"""The hit rate that a buffer is told the size of."""
KINDS = ("repeated", "returned", "first_read", "just_written", "distinct")
BY = ["method", "topk", "metric", "at"]
SPAN = 16
"""Queries of the working set that stands in the table."""


def of_groups(table: pd.DataFrame) -> pd.DataFrame:
    """Means over layers and groups by method, topk, metric and at, and `least` and `most` queries
    that those are over; in the order of the methods."""
    rows = table[table["cache"] == "group"]
    by = [rows[name].astype(str) if name in ("method", "metric") else rows[name] for name in BY]
    found = rows.groupby(by, sort=False)
    return found.agg(mean=("mean", "mean"), least=("count", "min"), most=("count", "max"))


def locality_summary(
    table: pd.DataFrame, methods: Sequence[str] | None = None, topk: Sequence[int] | None = None
) -> pd.DataFrame:
    """A line for each method and budget (all if None) that the table of locality has."""
    means = of_groups(table)
    pairs = list(dict.fromkeys((method, k) for method, k, *_ in means.index))
    lines = [
        [f"{method}, {k}", *_line(means.loc[method, k])]
        for method, k in sorted(pairs, key=lambda pair: [m for m, _ in pairs].index(pair[0]))
        if (methods is None or method in methods) and (topk is None or k in topk)
    ]
    titles = [FIGURES[kind].title.title() for kind in KINDS]
    buffer = [f"Keys For {ENOUGH:.0%} Hits", "Link Bytes Then"]
    return pd.DataFrame(
        lines, columns=["Method, top-k", "Queries", *titles, f"Working Set Of {SPAN}", *buffer]
    )


def _line(means: pd.DataFrame) -> list[str]:
    """The cells of one method and budget, by metric and `at`."""
    known = means.loc["repeated"]
    figures = [f"{means['mean'].get((kind, 0), float('nan')):.4f}" for kind in KINDS]
    working = means["mean"].get(("working_set", SPAN))
    return [
        number_of(int(known["least"].min()), int(known["most"].max())),
        *figures,
        "-" if working is None else f"{working:,.1f}",
        *_buffer(means["mean"]),
    ]


def _buffer(means: "pd.Series[float]") -> tuple[str, str]:
    """The least buffer that has enough hits, and the bytes that a query still loads."""
    if "hit_rate" not in means.index:
        return "-", "-"  # nothing is looked up: each query attends its own position alone
    rates = means.loc[["hit_rate"]].droplevel(0).sort_index()
    sizes = rates.index[rates >= ENOUGH]
    if sizes.empty:
        return f"more than {rates.index[-1]:,}", "-"
    read = means.get(("link_bytes", sizes[0]))
    return f"{sizes[0]:,}", "-" if read is None else f"{read:,.0f}"
