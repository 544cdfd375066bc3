"""Methods where they read the same bytes, in one table of words."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from retrace.analyze.metrics.registry import BY_NAME
from retrace.analyze.tables.figures import Figures
from retrace.analyze.units.costs import serving_words, with_charge

METRICS = ("recall", "attention_fraction", "error_norm")
RANKED = "attention_fraction"
"""What methods are ordered by, the best first, and held against the best in."""


def equal_bytes_title(figures: Figures, share: float) -> str:
    """What a table of a share is of."""
    return (
        f"At {share:.1%} of the bytes of full attention ({serving_words(figures.run)}), read off "
        "between budgets; in brackets 95 % intervals over sequences"
    )


def equal_bytes_summary(
    figures: Figures, share: float, methods: Sequence[str] | None = None
) -> pd.DataFrame:
    """A line for each method (all if None) that reads this share of full attention's bytes at some
    budget, those that keep most attention mass first: the budget, figures with their intervals, and
    how much more mass it keeps than the first, sequence by sequence."""
    columns = [
        "Method",
        "Top-k",
        *(BY_NAME[m].title.title() for m in METRICS),
        "More Than The First",
    ]
    found = figures.at_bytes([share], methods=methods, metrics=METRICS).dropna(subset="mean")
    ranked = found[found["metric"] == RANKED].sort_values("mean", ascending=False, kind="stable")
    if ranked.empty:
        return pd.DataFrame(columns=columns)
    order = [str(method) for method in ranked["method"]]
    apart = figures.at_bytes([share], methods=order, against=order[0], metrics=[RANKED])
    behind = {row["method"]: row for row in apart.to_dict("records")}
    rows = {(row["method"], row["metric"]): row for row in found.to_dict("records")}
    lines = [
        [
            with_charge(figures.run, method),
            f"{rows[method, RANKED]['topk']:.0f}",
            *(_with_interval(rows[method, metric], "") for metric in METRICS),
            _with_interval(behind[method], "+") if method != order[0] else "",
        ]
        for method in order
    ]
    return pd.DataFrame(lines, columns=columns)


def outside_words(figures: Figures, share: float, methods: Sequence[str] | None = None) -> str:
    """Which methods have no line in the table, and what they read; empty if all have."""
    found = figures.at_bytes([share], methods=methods, metrics=[RANKED])
    rows = found[found["mean"].isna()].to_dict("records")
    more = [f"{r['method']} ({r['least']:.1%})" for r in rows if r["least"] > share]
    less = [f"{r['method']} ({r['most']:.1%})" for r in rows if r["least"] <= share]
    parts = []
    if more:
        parts.append(f"Read more at their smallest budget: {', '.join(more)}.")
    if less:
        parts.append(f"Read less at their largest: {', '.join(less)}.")
    return " ".join(parts)


def _with_interval(row: Mapping[Hashable, Any], sign: str) -> str:
    """A figure, and its interval if it has one."""
    figure = f"{row['mean']:{sign}.4f}"
    if pd.isna(row["low"]):
        return figure
    return f"{figure} [{row['low']:{sign}.4f}, {row['high']:{sign}.4f}]"
