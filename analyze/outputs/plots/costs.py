"""A picture of what methods' figures cost."""

from matplotlib.figure import Figure

from retrace.analyze.metrics.registry import BY_NAME
from retrace.analyze.outputs.plots.style import (
    Onto,
    counted_words,
    from_zero,
    panel_grid,
    plain_numbers,
    say_nothing_counts,
    styles_of,
    wrapped,
)
from retrace.analyze.tables.figures import Figures
from retrace.analyze.units.costs import serving_words, with_charge


def error_by_cost(results: Figures, onto: Onto = None) -> Figure:
    """Error norm and lost attention mass against bytes read, or under `prefill:B` against pairs
    computed, a curve through a method's budgets: means over heads and layers, which is how methods
    compare at equal cost."""
    rows, cost = results.metrics, results.cost
    wanted = [cost, "error_norm", "attention_fraction"]
    means = rows.pivot_table("mean", ["method", "topk"], "metric").reindex(columns=wanted)
    means = means.dropna(subset=cost).sort_values(cost).reset_index()
    of_bytes = cost == "bytes_ratio"
    known = results.intervals("model", metrics=wanted[1:]).dropna(subset="low")
    bars = "; bars: 95 % over sequences" if len(known) else ""
    sheet = panel_grid(2, width=4.2, height=3.4, onto=onto)
    sheet.title(
        f"What {'bytes' if of_bytes else 'pairs'} buy, mean over heads and layers{bars}\n"
        f"{counted_words(results)}"
    )
    styles = styles_of(results.methods())
    lost = {"error_norm": (0, 1), "attention_fraction": (1, -1)}  # begins at, and grows by
    for method in results.methods():
        points = means[means["method"] == method]
        of_method = known[known["method"] == method]
        for panel, (metric, (start, sign)) in zip(sheet.panels, lost.items(), strict=True):
            style = styles[method]
            ends = of_method[of_method["metric"] == metric].merge(points[["topk", cost]], on="topk")
            panel.vlines(
                ends[cost],
                start + sign * ends["low"],
                start + sign * ends["high"],
                color=style.colour,
                linewidth=1.8,
                alpha=0.6,
            )
            panel.plot(
                points[cost],
                start + sign * points[metric],
                **style.line,
                markersize=4,
                linewidth=1.3,
                label=wrapped(with_charge(results.run, method) if of_bytes else method, 34),
            )
    from_zero(sheet.panels)
    for panel, label in zip(
        sheet.panels, (BY_NAME["error_norm"].axis, "attention mass lost"), strict=True
    ):
        panel.set_title(label, fontsize="small")
        panel.set_xlim(left=0.0)
        plain_numbers(panel)
        panel.grid(alpha=0.25)
        if means.empty:
            say_nothing_counts(panel)
    read = f"bytes read over those of full attention,\n{serving_words(results.run)}"
    sheet.label_outer(read if of_bytes else wrapped(BY_NAME[cost].description, 40), "mean")
    sheet.legend()
    return sheet.figure
