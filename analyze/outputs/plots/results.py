"""Pictures of results: heat maps over layers and heads, curves over budgets, lines over layers.

Figures are made without pyplot, so that no global state of matplotlib is touched and no display is
needed. What is drawn is what `Figures.metrics` and `Figures.curves` hold.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from retrace.analyze.metrics.registry import BY_LAYER, BY_NAME, Metric
from retrace.analyze.outputs.plots.costs import error_by_cost
from retrace.analyze.outputs.plots.files import PNG, save_pictures
from retrace.analyze.outputs.plots.locality import locality_figures
from retrace.analyze.outputs.plots.patterns import pattern_map
from retrace.analyze.outputs.plots.positions import position_figures
from retrace.analyze.outputs.plots.style import (
    DIVERGING,
    SEQUENTIAL,
    Onto,
    Picture,
    Sheet,
    Style,
    counted_words,
    from_zero,
    panel_grid,
    plain_numbers,
    say_nothing_counts,
    styles_of,
    wrapped,
)
from retrace.analyze.outputs.plots.sweeps import sweep_figures
from retrace.analyze.outputs.plots.tails import tails_by_layer
from retrace.analyze.tables.figures import Figures
from retrace.traces import RetraceError
from retrace.traces.errors import did_you_mean

PLOTS = (
    "attention-fraction-*",
    "recall-by-layer",
    "error-norm-by-layer",
    "error-by-bytes",
    "error-by-pairs",
    "head-patterns",
    "by-position",
    "by-distance",
    "tails-by-layer",
    "buffer-*",
    "sweep-*",
)
"""Names of the pictures that are drawn of results, without their formats."""

PANELS = 6
"""Most budgets that a figure over layers shows."""
LAYER_GROUPS = 12
"""Most panels of the curves by layer."""
BANDS = 4
"""Most methods whose spread is shaded in one panel: more would hide each other."""
LONGEST_SLUG = 120


def draw_all(results: Figures, folder: Path, formats: Sequence[str] = (PNG,)) -> list[Path]:
    """Draw every plot of the results into a folder, in each of the formats; returns the files, in
    the order drawn.

    Raises:
        RetraceError: a format that is none of `FORMATS`.
    """
    return save_pictures(pictures(results), folder, formats)


def draw_one(results: Figures, name: str, onto: Onto) -> Figure:
    """Draw one plot, onto the caller's panels or a figure of its own.

    Raises:
        RetraceError: these results have no such plot, or it has another number of panels.
    """
    known = pictures(results)
    if name not in known:
        raise RetraceError(
            f"These results have no plot {name!r}.{did_you_mean(name, known)} They have: "
            f"{', '.join(known)}."
        )
    return known[name](onto)


def pictures(results: Figures) -> dict[str, Picture]:
    """What draws each plot of the results, by its name."""
    found: dict[str, Picture] = {}
    for method in results.methods():
        budgets = results.topk(method)
        for k in budgets if len(budgets) <= 3 else budgets[-1:]:
            name = f"attention-fraction-heatmap-{slug(method)}-k{k}"
            found[name] = partial(attention_fraction_heatmap, results, method, k)
    found["attention-fraction-curves"] = partial(attention_fraction_curves, results)
    found["attention-fraction-curves-by-layer"] = partial(
        attention_fraction_curves_by_layer, results
    )
    for metric in BY_LAYER:
        if (results.metrics["metric"] == metric).any():  # earlier results have fewer
            name = f"{metric.replace('_', '-')}-by-layer"
            found[name] = partial(by_layer, results, BY_NAME[metric])
    by_pairs = results.cost == "compute_ratio"
    found["error-by-pairs" if by_pairs else "error-by-bytes"] = partial(error_by_cost, results)
    if len(results.head_patterns):
        found["head-patterns"] = partial(pattern_map, results)
    for axis, picture in position_figures(results).items():
        found[f"by-{axis}"] = picture
    if len(results.tails):
        found["tails-by-layer"] = partial(tails_by_layer, results)
    found |= locality_figures(results)
    for (method, parameter), picture in sweep_figures(results).items():
        found[f"sweep-{slug(method)}-{slug(parameter)}"] = picture
    return found


def slug(method: str) -> str:
    """A method spec as part of a file's name.

    >>> slug("quest:page=32,pool=sum")
    'quest-page=32-pool=sum'
    """
    name = re.sub(r"[^\w.=+-]+", "-", method).strip("-.")
    if len(name) > LONGEST_SLUG:
        digest = hashlib.sha256(method.encode()).hexdigest()[:8]
        name = f"{name[:LONGEST_SLUG]}-{digest}"
    return name


def attention_fraction_heatmap(
    results: Figures, method: str, topk: int, onto: Onto = None
) -> Figure:
    """Exact and approximate attention fraction of every layer and head, and their difference."""
    rows = results.metrics
    rows = rows[(rows["method"] == method) & (rows["topk"] == topk)]
    exact = _layers_by_heads(rows, "exact_attention_fraction")
    found = _layers_by_heads(rows, "attention_fraction")
    layers, heads = exact.shape
    height = float(np.clip(0.17 * layers + 1.5, 3.0, 11.0))
    width = 3 * float(np.clip(0.2 * heads + 1.6, 2.8, 5.5)) + 1.0
    sheet = Sheet.of((width, height), 1, 3, onto, sharex=True, sharey=True)
    panels = sheet.panels
    sheet.title(f"Attention fraction of each layer and head: {wrapped(method, 60)}, k = {topk}")
    fractions = Normalize(0.0, 1.0)
    for axes, part, title in (
        (panels[0], exact, f"exact top {topk}"),
        (panels[1], found, wrapped(method, 28)),
    ):
        image = _draw_cells(axes, part, title, fractions, SEQUENTIAL)
    sheet.figure.colorbar(image, ax=panels[:2], label="share of attention mass", pad=0.02)
    lost = exact - found
    largest = lost.abs().max().max()
    # Never less than one per cent, or rounding would be painted as if it were a difference.
    bound = max(0.01, float(largest)) if np.isfinite(largest) else 0.01
    image = _draw_cells(
        panels[2], lost, "difference\n(exact less approximate)", Normalize(-bound, bound), DIVERGING
    )
    sheet.figure.colorbar(image, ax=panels[2], label="share of attention mass", pad=0.04)
    panels[0].set_ylabel("layer")
    return sheet.figure


def attention_fraction_curves(results: Figures, onto: Onto = None) -> Figure:
    """Attention fraction over budgets: means over heads and layers, with a band across layers."""
    curves = _Curves.of(results)
    sheet = Sheet.of((7.2, 4.8), 1, 1, onto)
    [axes] = sheet.panels
    _draw_curves(axes, curves, banded=True)
    shaded = "; shaded: 10 to 90 % of layers" if curves.shaded else ""
    sheet.title(f"Attention fraction, mean over heads and layers{shaded}\n{counted_words(results)}")
    _label_budgets(axes, results)
    axes.set_xlabel("budget k (keys per query and head)")
    axes.set_ylabel("share of attention mass on the keys attended")
    sheet.legend()
    return sheet.figure


def attention_fraction_curves_by_layer(results: Figures, onto: Onto = None) -> Figure:
    """Attention fraction over budgets, a panel for each layer or group of consecutive layers."""
    curves = _Curves.of(results)
    groups = _layer_groups(sorted(results.curves["layer"].unique()))
    sheet = panel_grid(len(groups), width=2.7, height=2.1, onto=onto)
    sheet.title(f"Attention fraction by layer, mean over heads\n{counted_words(results)}")
    for axes, group in zip(sheet.panels, groups, strict=True):
        _draw_curves(axes, curves.within(group), banded=False)
        axes.set_title(_layer_words(group), fontsize="small")
        axes.tick_params(labelsize="small")
    for axes in sheet.panels:
        _label_budgets(axes, results)
    sheet.label_outer("budget k", "share of attention mass\non the keys attended")
    sheet.legend()
    return sheet.figure


class _Curves(NamedTuple):
    """Mean over heads, one row per (layer, topk), of exact attention and of each method."""

    exact: pd.DataFrame
    methods: dict[str, pd.DataFrame]
    """In the order of the results, exact attention itself left out."""

    @classmethod
    def of(cls, results: Figures) -> "_Curves":
        rows = results.curves
        exact = rows[rows["metric"] == "exact_attention_fraction"]
        # Every method's rows hold it; those of one budget are the same.
        exact = exact.drop_duplicates(["layer", "head", "topk"])
        found = rows[rows["metric"] == "attention_fraction"]
        methods = {
            method: _over_heads(found[found["method"] == method])
            for method in results.methods()
            if method != "exact"
        }
        return cls(_over_heads(exact), methods)

    @property
    def shaded(self) -> bool:
        """Whether few enough methods are drawn for their spread to be seen."""
        return len(self.methods) <= BANDS

    def within(self, layers: Sequence[int]) -> "_Curves":
        """The curves of some layers."""
        return _Curves(
            self.exact[self.exact["layer"].isin(list(layers))],
            {m: rows[rows["layer"].isin(list(layers))] for m, rows in self.methods.items()},
        )


def _over_heads(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.groupby(["layer", "topk"])["mean"].mean().dropna().reset_index()


def _draw_curves(axes: Axes, curves: _Curves, *, banded: bool) -> None:
    styles = styles_of(curves.methods)
    shaded = banded and curves.shaded
    for name, rows in {"exact": curves.exact, **curves.methods}.items():
        style = styles[name]
        by_budget = rows.groupby("topk")["mean"]
        mean = by_budget.mean()
        if shaded:
            low, high = by_budget.quantile(0.1), by_budget.quantile(0.9)
            axes.fill_between(mean.index, low, high, color=style.colour, alpha=0.12, linewidth=0)
        axes.plot(
            mean.index,
            mean,
            color=style.colour,
            linestyle=style.dashes,
            # Few budgets are points that were asked for, not a curve.
            marker=style.marker if len(mean) <= 12 else "",
            markersize=4,
            linewidth=1.8 if name == "exact" else 1.4,
            zorder=3 if name == "exact" else 2,
            label=wrapped(name, 34),
        )
    axes.set_xscale("log")
    axes.set_ylim(0.0, 1.02)
    axes.grid(alpha=0.25)
    if not len(curves.exact):
        say_nothing_counts(axes)


def _label_budgets(axes: Axes, results: Figures) -> None:
    """Ticks at 1, 2, 5, 10, ... within the budgets that there are."""
    budgets = results.curves["topk"]
    least, most = int(budgets.min()), int(budgets.max())
    ticks = [m * 10**e for e in range(7) for m in (1, 2, 5) if least <= m * 10**e <= most]
    if len(ticks) < 2:
        ticks = sorted({least, most})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))
    if least == most:
        axes.set_xlim(least / 2, least * 2)


def by_layer(results: Figures, metric: Metric, onto: Onto = None) -> Figure:
    """A metric of every method over layers: mean and standard deviation across heads."""
    rows = results.metrics[results.metrics["metric"] == metric.name]
    known = results.intervals("layer", metrics=[metric.name]).dropna(subset="low")
    budgets = _chosen(sorted(int(k) for k in rows["topk"].unique()))
    layers = sorted(int(layer) for layer in rows["layer"].unique())
    methods = results.methods()
    styles = styles_of(methods)
    width = float(np.clip(0.09 * len(layers) + 2.2, 3.2, 5.4))
    sheet = panel_grid(len(budgets), width=width, height=2.9, columns=3, onto=onto)
    bars = "; bars: 95 % over sequences" if len(known) else ""
    sheet.title(
        f"{metric.title} by layer: mean and standard deviation across heads{bars}\n"
        f"{counted_words(results)}"
    )
    for axes, k in zip(sheet.panels, budgets, strict=True):
        drawn = False
        for number, method in enumerate(methods):
            of_method = rows[(rows["method"] == method) & (rows["topk"] == k)]
            heads = of_method.groupby("layer")["mean"]
            mean, std = heads.mean().dropna(), heads.std(ddof=0)
            if mean.empty:
                continue
            drawn = True
            share = (number + 0.5) / len(methods)
            _draw_layers(
                axes, mean, std.loc[mean.index], styles[method], method, metric.most, share
            )
            bounds = known[(known["method"] == method) & (known["topk"] == k)].set_index("layer")
            _draw_intervals(axes, mean, bounds, styles[method], share)
        axes.set_title(f"k = {k}", fontsize="small")
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        if len(layers) == 1:
            axes.set_xlim(layers[0] - 1, layers[0] + 1)
            axes.set_xticks(layers)
        if not drawn:
            say_nothing_counts(axes)
    from_zero(sheet.panels, None if metric.most is None else 1.03 * metric.most)
    plain_numbers(*sheet.panels)
    sheet.label_outer("layer", metric.axis)
    sheet.legend()
    return sheet.figure


def _draw_layers(
    axes: Axes,
    mean: "pd.Series[float]",
    std: "pd.Series[float]",
    style: Style,
    method: str,
    most: float | None,
    share: float,
) -> None:
    """One method's line; `share` is its place among the methods, from 0 to 1."""
    line: dict[str, Any] = {
        "color": style.colour,
        "linestyle": style.dashes,
        "marker": style.marker if len(mean) <= 40 else "",
        "markersize": 3,
        "linewidth": 1.3,
        "label": wrapped(method, 34),
    }
    if len(mean) == 1:  # a band has no width over one layer, and points side by side can be told
        place = mean.index + 0.6 * (share - 0.5)
        axes.errorbar(place, mean, yerr=std, elinewidth=0.9, capsize=2, **line)
        return
    low, high = (mean - std).clip(lower=0.0), (mean + std).clip(upper=most)
    axes.fill_between(mean.index, low, high, color=style.colour, alpha=0.1, linewidth=0)
    axes.plot(mean.index, mean, **line)


def _draw_intervals(
    axes: Axes, mean: "pd.Series[float]", bounds: pd.DataFrame, style: Style, share: float
) -> None:
    """The interval of each layer's mean over sequences, as a bar through its point."""
    bounds = bounds.reindex(mean.index).dropna(subset="low")
    offset = 0.6 * (share - 0.5) if len(mean) == 1 else 0.0
    axes.vlines(
        bounds.index + offset, bounds["low"], bounds["high"], color=style.colour, linewidth=2.2
    )


def _layers_by_heads(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    table = rows[rows["metric"] == metric].pivot(index="layer", columns="head", values="mean")
    return table.sort_index().sort_index(axis="columns")


def _draw_cells(axes: Axes, cells: pd.DataFrame, title: str, scale: Normalize, colours: str) -> Any:
    import matplotlib

    colormap = matplotlib.colormaps[colours].with_extremes(bad="0.8")
    image = axes.imshow(
        np.ma.masked_invalid(cells.to_numpy(dtype=float)),
        aspect="auto",
        norm=scale,
        cmap=colormap,
        interpolation="nearest",
    )
    axes.set_title(title, fontsize="small")
    axes.set_xlabel("head")
    for axis, names in ((axes.xaxis, cells.columns), (axes.yaxis, cells.index)):
        step = -(-len(names) // 16)
        axis.set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])
        axis.set_tick_params(labelsize="small")
    if cells.isna().to_numpy().all():
        say_nothing_counts(axes)
    return image


def _chosen(budgets: list[int]) -> list[int]:
    """At most `PANELS` budgets, evenly spread, the least and the largest among them."""
    if len(budgets) <= PANELS:
        return budgets
    return [budgets[i] for i in np.linspace(0, len(budgets) - 1, PANELS).round().astype(int)]


def _layer_groups(layers: list[int]) -> list[list[int]]:
    """Consecutive layers in at most `LAYER_GROUPS` groups of nearly one size."""
    groups = np.array_split(np.array(layers), min(len(layers), LAYER_GROUPS))
    return [[int(layer) for layer in group] for group in groups]


def _layer_words(group: list[int]) -> str:
    return f"layer {group[0]}" if len(group) == 1 else f"layers {group[0]} to {group[-1]}"
