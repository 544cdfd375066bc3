"""Pictures of figures by position, and by distance from the prefix that a state was built from."""

import itertools
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from retrace.analyze.metrics.buckets import AXES
from retrace.analyze.metrics.registry import BUCKETED, BY_NAME
from retrace.analyze.outputs.plots.style import (
    Onto,
    Picture,
    Sheet,
    counted_words,
    from_zero,
    plain_numbers,
    say_nothing_counts,
    styles_of,
    wrapped,
)
from retrace.analyze.tables.figures import Figures

BUDGETS = 3
"""Most budgets that one figure shows: the least, the largest and the middle one."""
TICKS = 8
LABELS = {"position": "position", "distance": "distance from the prefix"}


def position_figures(results: Figures) -> dict[str, Picture]:
    """A picture for each axis that queries are told apart by, if the results hold any figure."""
    held = set(results.positions["axis"])
    return {axis: partial(_along, results, axis) for axis in AXES if axis in held}


def _along(results: Figures, axis: str, onto: Onto = None) -> Figure:
    """Panels of metrics by budgets; in each a line for every method, a point for every bucket."""
    rows = results.positions[results.positions["axis"] == axis]
    means: Any = rows.groupby(["metric", "topk", "method", "first"], observed=True)["mean"].mean()
    budgets = sorted(int(k) for k in rows["topk"].unique())
    if len(budgets) > BUDGETS:
        budgets = [budgets[0], budgets[len(budgets) // 2], budgets[-1]]
    methods = results.methods()
    styles = styles_of(methods)
    size = (max(3.4 * len(budgets), 5.0), 6.0)
    sheet = Sheet.of(size, len(BUCKETED), len(budgets), onto, sharex=True, sharey="row")
    sheet.title(
        f"By {LABELS[axis]}, in buckets that double: mean over heads and layers\n"
        f"{counted_words(results)}"
    )
    panels = np.array(sheet.panels).reshape(len(BUCKETED), len(budgets))
    for (row, metric), (column, k) in itertools.product(enumerate(BUCKETED), enumerate(budgets)):
        axes = panels[row, column]
        drawn = [method for method in methods if (metric, k, method) in means.index]
        for method in drawn:
            line, style = means[metric, k, method].dropna(), styles[method]
            axes.plot(
                [_middle(first) for first in line.index],
                line,
                **style.line,
                markersize=3,
                linewidth=1.3,
                label=wrapped(method, 34),
            )
        if not drawn:
            say_nothing_counts(axes)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize="small")
        if row == 0:
            axes.set_title(f"k = {k}", fontsize="small")
        if column == 0:
            axes.set_ylabel(BY_NAME[metric].axis, fontsize="small")
        if row == len(BUCKETED) - 1:
            axes.set_xlabel(LABELS[axis], fontsize="small")
    # When all panels of a row have their lines: limits that are set no longer follow them.
    for metric, axes in zip(BUCKETED, panels, strict=True):
        most = BY_NAME[metric].most
        from_zero(axes, None if most is None else 1.02 * most)
        plain_numbers(*axes)
    for axes in sheet.panels:
        _label_buckets(axes, sorted(int(first) for first in rows["first"].unique()))
    sheet.legend()
    return sheet.figure


def _middle(first: int) -> float:
    """Where a bucket stands on a logarithmic axis, which has no 0."""
    return max(0.5, (first + max(first, 2 * first - 1)) / 2)


def _label_buckets(axes: Axes, firsts: list[int]) -> None:
    """A tick where some of the buckets begin; 0 is left of 1."""
    axes.set_xscale("log", base=2)
    shown = firsts[:: -(-len(firsts) // TICKS)]
    axes.xaxis.set_major_locator(FixedLocator([max(0.5, first) for first in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{np.floor(place):g}"))
