"""Pictures of sweeps: figures over the values of a method's parameter."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from retrace.analyze.metrics.registry import BY_NAME, SWEPT
from retrace.analyze.outputs.plots.style import (
    SEQUENTIAL,
    Onto,
    Picture,
    Sheet,
    counted_words,
    plain_numbers,
    say_nothing_counts,
    wrapped,
)
from retrace.analyze.tables.figures import Figures
from retrace.analyze.units.costs import NOT_CHARGED, is_charged, serving_words

ROWS = 6
"""Most combinations of the other parameters that one figure shows."""


def sweep_figures(results: Figures) -> dict[tuple[str, str], Picture]:
    """A picture for each method and parameter of which the results hold several values, other
    parameters being equal."""
    figures: dict[tuple[str, str], Picture] = {}
    for name in results.names():
        table = results.parameters(name)
        swept = [p for p in table.columns if table[p].map(repr).nunique() > 1]
        for parameter in swept:
            others = [p for p in swept if p != parameter]
            rows = [rows for rows in _alike(table, others).values() if len(rows) > 1]
            if rows:
                figures[name, parameter] = partial(
                    _over_values, results, name, parameter, others, rows
                )
    return figures


def _alike(table: pd.DataFrame, others: list[str]) -> dict[str, pd.DataFrame]:
    """The specs of equal other parameters, by those in words."""
    words = [
        ", ".join(f"{p}={value}" for p, value in zip(others, values, strict=True))
        for values in (table[others].itertuples(index=False) if others else [()] * len(table))
    ]
    return {one: table[[w == one for w in words]] for one in dict.fromkeys(words)}


def _over_values(
    results: Figures,
    name: str,
    parameter: str,
    others: list[str],
    rows: list[pd.DataFrame],
    onto: Onto = None,
) -> Figure:
    """A row of panels for each combination of the other parameters, a line for each budget."""
    shown = rows[:ROWS]
    methods = [str(method) for table in shown for method in table.index]
    rows_shown = results.metrics[results.metrics["method"].isin(methods)]
    means: Any = rows_shown.groupby(["method", "topk", "metric"])["mean"].mean()
    known: Any = results.intervals("model", methods=methods, metrics=SWEPT)
    known = known.dropna(subset="low").set_index(["method", "topk", "metric"])
    budgets = sorted({k for method in methods for k in results.topk(method)})
    size = (2.9 * len(SWEPT), 2.3 * len(shown) + 1.0)
    sheet = Sheet.of(size, len(shown), len(SWEPT), onto, sharex=True, sharey="col")
    bars = "; bars: 95 % over sequences" if len(known) else ""
    less = f"; {len(shown)} of {len(rows)} combinations" if len(shown) < len(rows) else ""
    sheet.title(
        f"{name} over {parameter}: mean over heads and layers{bars}{less}\n{counted_words(results)}"
    )
    panels = np.array(sheet.panels).reshape(len(shown), len(SWEPT))
    places = _places(rows, parameter)
    for (number, table), (column, metric) in itertools.product(enumerate(shown), enumerate(SWEPT)):
        axes = panels[number, column]
        drawn = False
        for i, k in enumerate(budgets):
            found = {
                places[value]: (method, k, metric)
                for method, value in table[parameter].items()
                if (method, k, metric) in means.index and not pd.isna(means[method, k, metric])
            }
            line = sorted(found)
            if not line:
                continue
            drawn = True
            colour = colormaps[SEQUENTIAL](0.9 * i / max(1, len(budgets) - 1))
            figures = [means[found[place]] for place in line]
            axes.plot(line, figures, "o-", color=colour, markersize=3, label=f"k = {k}")
            bounds = [
                (place, known.loc[found[place]]) for place in line if found[place] in known.index
            ]
            axes.vlines(
                [place for place, _ in bounds],
                [row["low"] for _, row in bounds],
                [row["high"] for _, row in bounds],
                color=colour,
                linewidth=2.2,
            )
        if not drawn:
            say_nothing_counts(axes)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize="small")
        if number == 0:
            title = wrapped(BY_NAME[metric].axis, 24)
            if metric == "bytes_ratio":
                title += f",\n{serving_words(results.run)}"
                if not is_charged(results.run, methods[0]):
                    title += f"\n({NOT_CHARGED})"
            axes.set_title(title, fontsize="small")
        if number == len(shown) - 1:
            axes.set_xlabel(parameter)
    for axes, table in zip(panels[:, 0], shown, strict=True):
        axes.set_ylabel("\n".join(f"{p}={table[p].iloc[0]}" for p in others), fontsize="small")
    plain_numbers(*sheet.panels)
    for axes in sheet.panels:
        _label_values(axes, places)
    sheet.legend()
    return sheet.figure


def _places(rows: list[pd.DataFrame], parameter: str) -> dict[Any, float]:
    """Where each value of the parameter stands: a number at itself, words side by side."""
    values = list(dict.fromkeys(value for table in rows for value in table[parameter]))
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return {value: float(value) for value in sorted(values)}
    return {value: float(place) for place, value in enumerate(values)}


def _label_values(axes: Axes, places: dict[Any, float]) -> None:
    """A tick at each value; a logarithmic axis where all are powers of two."""
    numbers = all(place == value for value, place in places.items())
    if numbers and all(isinstance(v, int) and v > 0 and not v & (v - 1) for v in places):
        axes.set_xscale("log", base=2)
    words = {place: str(value) for value, place in places.items()}
    axes.xaxis.set_major_locator(FixedLocator(list(words)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: words.get(place, "")))
