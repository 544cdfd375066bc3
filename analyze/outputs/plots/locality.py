"""Pictures of what a buffer of the keys read last holds, and of what it lacks, by its size."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from retrace.analyze.outputs.locality import of_groups
from retrace.analyze.outputs.plots.style import (
    counted_words,
    label_outer,
    legend,
    panel_grid,
    plain_numbers,
    say_nothing_counts,
    styles_of,
    wrapped,
)
from retrace.analyze.tables.figures import Figures

PICTURES = {
    "hit_rate": ("buffer-hits", "share of keys found in the buffer"),
    "link_bytes": ("buffer-link", "bytes over the link per query"),
}
"""Name and vertical axis of the figure of each metric."""
BUDGETS = 4
"""Most budgets that a figure shows: the least and the largest among them."""


def locality_figures(results: Figures) -> dict[str, Figure]:
    """A figure for each of `PICTURES` that the results hold anything of, by its name."""
    means = of_groups(results.locality).reset_index()
    return {
        name: _over_sizes(results, means[means["metric"] == metric], label, metric == "hit_rate")
        for metric, (name, label) in PICTURES.items()
        if (means["metric"] == metric).any()
    }


def _over_sizes(results: Figures, means: pd.DataFrame, label: str, share: bool) -> Figure:
    """A panel for each budget; in each a line for every method, a point for every size."""
    budgets = sorted(int(k) for k in means["topk"].unique())
    if len(budgets) > BUDGETS:
        step = (len(budgets) - 1) / (BUDGETS - 1)
        budgets = [budgets[round(i * step)] for i in range(BUDGETS)]
    figure, panels = panel_grid(len(budgets), width=3.2, height=3.0)
    figure.suptitle(
        "Keys of a group in a buffer of those read last, mean over groups and layers\n"
        f"{counted_words(results)}",
        fontsize="medium",
    )
    styles = styles_of(results.methods())
    for axes, k in zip(panels, budgets, strict=True):
        of_budget = means[means["topk"] == k]
        for method in results.methods():
            line = of_budget[of_budget["method"] == method].sort_values("at")
            if len(line):
                axes.plot(
                    line["at"],
                    line["mean"],
                    **styles[method].line,
                    markersize=3,
                    linewidth=1.3,
                    label=wrapped(method, 34),
                )
        axes.set_title(f"k = {k}", fontsize="small")
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize="small")
        if of_budget.empty:
            say_nothing_counts(axes)
    panels[0].set_xscale("log", base=2)
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    panels[0].set_ylim(0.0, 1.02 if share else None)
    plain_numbers(panels[0])
    label_outer(panels, "keys that the buffer holds", label)
    legend(figure, *panels)
    return figure
