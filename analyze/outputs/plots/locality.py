"""Pictures of what a buffer of the keys read last holds, and of what it lacks, by its size."""

from functools import partial

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from retrace.analyze.outputs.locality import of_groups
from retrace.analyze.outputs.plots.style import (
    Onto,
    Picture,
    counted_words,
    from_zero,
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


def locality_figures(results: Figures) -> dict[str, Picture]:
    """A picture for each of `PICTURES` that the results hold anything of, by its name."""
    means = of_groups(results.locality).reset_index()
    return {
        name: partial(
            _over_sizes, results, means[means["metric"] == metric], label, metric == "hit_rate"
        )
        for metric, (name, label) in PICTURES.items()
        if (means["metric"] == metric).any()
    }


def _over_sizes(
    results: Figures, means: pd.DataFrame, label: str, share: bool, onto: Onto = None
) -> Figure:
    """A panel for each budget; in each a line for every method, a point for every size."""
    budgets = sorted(int(k) for k in means["topk"].unique())
    if len(budgets) > BUDGETS:
        step = (len(budgets) - 1) / (BUDGETS - 1)
        budgets = [budgets[round(i * step)] for i in range(BUDGETS)]
    sheet = panel_grid(len(budgets), width=3.2, height=3.0, onto=onto)
    sheet.title(
        "Keys of a group in a buffer of those read last, mean over groups and layers\n"
        f"{counted_words(results)}"
    )
    styles = styles_of(results.methods())
    for axes, k in zip(sheet.panels, budgets, strict=True):
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
    for axes in sheet.panels:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    from_zero(sheet.panels, 1.02 if share else None)
    plain_numbers(*sheet.panels)
    sheet.label_outer("keys that the buffer holds", label)
    sheet.legend()
    return sheet.figure
