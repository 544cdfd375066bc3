"""Errors after the output projection, in one table of words."""

from collections.abc import Sequence

import pandas as pd

from retrace.analyze.replay.counting import number_of

PROJECTED_TITLE = (
    "Errors after the output projection (means over layers; all heads of a layer together)"
)


def projected_summary(
    table: pd.DataFrame, methods: Sequence[str] | None = None, topk: Sequence[int] | None = None
) -> pd.DataFrame:
    """A line for each method and budget (all if None) that the table of projected errors has."""
    lines = []
    plain = table.astype({"method": "str"})
    for method in dict.fromkeys(plain["method"]):
        for k in sorted(plain.loc[plain["method"] == method, "topk"].unique()):
            if (methods is None or method in methods) and (topk is None or k in topk):
                part = plain[(plain["method"] == method) & (plain["topk"] == k)]
                worst = part.loc[part["mean"].idxmax()]
                lines.append(
                    [
                        f"{method}, {k}",
                        number_of(int(part["count"].min()), int(part["count"].max())),
                        f"{part['mean'].mean():.4f}",
                        f"{worst['mean']:.4f} (layer {worst['layer']})",
                    ]
                )
    columns = ["Method, top-k", "Queries", "Projected Error", "In The Worst Layer"]
    return pd.DataFrame(lines, columns=columns)
