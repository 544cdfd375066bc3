"""Figures by position, and by distance from the index's prefix, that a page holds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from retrace.analyze.metrics.buckets import AXES
from retrace.analyze.outputs.report.packed import Packed
from retrace.analyze.tables.figures import Figures

FIGURES = 3_000_000
"""Most figures of all methods of a page together; of more, it holds means over heads only."""
BITS = 11
"""Of a figure's mantissa: finer than a screen."""
GROUP = ["method", "metric", "topk"]

Places = dict[str, dict[str, dict[str, int]]]
"""Where the grids of a method are, by axis, metric and budget."""


def fit(runs: Sequence[Figures]) -> bool:
    """Whether the figures of every head fit the page."""
    return sum(len(run.positions) for run in runs) <= FIGURES


def along(
    results: Figures, layers: list[int], heads: int, packed: Packed
) -> tuple[dict[str, Any], dict[str, Places]]:
    """What all methods of results share, and the places of each one's grids.

    Shared are the heads of a grid and, of each axis that there is anything on, the first number of
    every bucket and how many queries it has at each budget. A grid is (buckets, layers, heads), NaN
    where there is no figure; `packed` takes it.

    Args:
        results: those that the page is of.
        layers: indices of their layers, ascending.
        heads: of a layer, or 1 for means over them.
        packed: the page's figures.
    """
    rows = results.positions
    rows = rows[rows["layer"].isin(layers)]
    if heads == 1:
        of_layer = rows.groupby([*GROUP, "axis", "first", "layer"], observed=True)
        rows = of_layer.agg(mean=("mean", "mean"), count=("count", "max")).reset_index()
        rows["head"] = 0
    axes: dict[str, Any] = {}
    places: dict[str, Places] = {}
    for axis in AXES:
        of_axis = rows[(rows["axis"] == axis) & rows["head"].between(0, heads - 1)]
        firsts, bucket = np.unique(of_axis["first"], return_inverse=True)
        if not len(firsts):
            continue
        axes[axis] = {"firsts": firsts.tolist(), "queries": _queries(of_axis)}
        row = np.searchsorted(layers, of_axis["layer"])
        place = (bucket * len(layers) + row) * heads + of_axis["head"].to_numpy()
        keys = {name: pd.Categorical(of_axis[name]) for name in GROUP}
        figures = pd.DataFrame({"place": place, "mean": of_axis["mean"].to_numpy(), **keys})
        key: Any
        for key, part in figures.groupby(list(keys), sort=False, observed=True):
            method, metric, k = key
            grid = np.full(len(firsts) * len(layers) * heads, np.nan)
            grid[part["place"]] = part["mean"]
            at = places.setdefault(str(method), {}).setdefault(axis, {}).setdefault(str(metric), {})
            at[str(int(k))] = packed.add(grid, BITS)
    return {"heads": heads, "axes": axes}, places


def _queries(rows: pd.DataFrame) -> dict[str, list[int]]:
    """How many queries each bucket has by budget; all methods of a run answer the same."""
    counts = rows.pivot_table("count", "topk", "first", aggfunc="max").fillna(0).astype(int)
    return {str(k): of_budget.tolist() for k, of_budget in counts.iterrows()}
