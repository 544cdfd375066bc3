"""A picture of the tails of every layer: medians, the bad percentile, and the worst queries."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from retrace.analyze.metrics.registry import BY_NAME, TAILED
from retrace.analyze.outputs.plots.style import (
    Onto,
    Sheet,
    counted_words,
    plain_numbers,
    styles_of,
    wrapped,
)
from retrace.analyze.tables.figures import Figures

BANDS = 4
"""Most methods whose bars are joined by a shade: more would hide each other."""


def tails_by_layer(results: Figures, onto: Onto = None) -> Figure:
    """A panel for each metric that has tails, at the largest budget: for every method the median
    over queries and a bar to its bad percentile, both means over heads, and the worst query of any
    head as a point."""
    rows = results.tails
    k = int(rows["topk"].max())
    rows = rows[rows["topk"] == k]
    layers = sorted(int(layer) for layer in rows["layer"].unique())
    methods = [m for m in results.methods() if (rows["method"] == m).any()]
    styles = styles_of(results.methods())
    sheet = Sheet.of((11.0, 3.9), 1, len(TAILED), onto)
    sheet.title(
        f"Tails by layer, k = {k}: median over queries, bars to the 5th percentile of shares and "
        f"the 95th of errors\n(means over heads); points: the worst query of any head; "
        f"{counted_words(results)}"
    )
    for axes, name in zip(sheet.panels, TAILED, strict=True):
        metric = BY_NAME[name]
        of_metric = rows[rows["metric"] == name]
        bad = "p5" if metric.better > 0 else "p95"
        for number, method in enumerate(methods):
            by_layer = of_metric[of_metric["method"] == method].groupby("layer")
            middle, tail = by_layer["p50"].mean(), by_layer[bad].mean()
            worst = by_layer["worst"].min() if metric.better > 0 else by_layer["worst"].max()
            style = styles[method]
            # Side by side, so that one layer's points can be told.
            place = middle.index + (0.6 * ((number + 0.5) / len(methods) - 0.5)) * (
                len(layers) == 1
            )
            if len(methods) <= BANDS:
                axes.fill_between(place, middle, tail, color=style.colour, alpha=0.12, linewidth=0)
            axes.vlines(place, middle, tail, color=style.colour, alpha=0.35, linewidth=0.9)
            axes.plot(
                place,
                middle,
                color=style.colour,
                linestyle=style.dashes,
                linewidth=1.3,
                label=wrapped(method, 34),
            )
            axes.plot(
                place,
                worst,
                color=style.colour,
                linestyle="",
                marker=style.marker or "o",
                markersize=3,
            )
        axes.set_title(metric.title, fontsize="small")
        axes.set_xlabel("layer")
        axes.set_ylabel(metric.axis)
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_ylim(bottom=0.0, top=None if metric.most is None else 1.03 * metric.most)
        if len(layers) == 1:
            axes.set_xlim(layers[0] - 1, layers[0] + 1)
            axes.set_xticks(layers)
    plain_numbers(*sheet.panels)
    sheet.legend()
    return sheet.figure
