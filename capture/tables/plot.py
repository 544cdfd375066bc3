"""What methods in the loop cost, over what replay says of them."""

from pathlib import Path

from matplotlib.figure import Figure

from retrace.analyze.outputs.plots.files import save_picture
from retrace.analyze.outputs.plots.style import (
    label_outer,
    legend,
    logarithmic,
    panel_grid,
    styles_of,
    wrapped,
)
from retrace.analyze.units.costs import NOT_CHARGED, SERVING_DTYPE
from retrace.capture.tables.evaluation import Evaluation

DPI = 130
AGAINST = {
    "error_norm": "error norm",
    "attention_fraction": "attention mass lost",
    "recall": "keys missed, 1 - recall",
    "bytes_ratio": f"bytes read, of full attention\n(a cache in {SERVING_DTYPE})",
}
"""Replay's figures, and how the plot names them."""
LEAST = 1e-4
"""In nats: differences below are drawn there, since axes are logarithmic."""


def draw_evaluation(evaluation: Evaluation, folder: Path) -> Path:
    """Draw the plot into a folder; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "loss-by-replay.png"
    save_picture(loss_by_replay(evaluation), file, DPI)
    return file


def loss_by_replay(evaluation: Evaluation) -> Figure:
    """The loss of likelihood over each of replay's figures, a line through a method's budgets."""
    points = evaluation.points
    figure, panels = panel_grid(len(AGAINST), width=3.2, height=3.2, share_x=False)
    figure.suptitle("Loss of likelihood in the loop, nats per token", fontsize="medium")
    styles = styles_of(points["method"].unique())
    charged = points["charged"] if "charged" in points else points["method"].notna()
    labels = {
        str(method): str(method) if rows.all() else f"{method} ({NOT_CHARGED})"
        for method, rows in charged.groupby(points["method"])
    }
    for axes, (name, label) in zip(panels, AGAINST.items(), strict=True):
        for method, rows in points.groupby("method", sort=False):
            across = rows[name] if name in ("error_norm", "bytes_ratio") else 1 - rows[name]
            style = styles[str(method)]
            axes.plot(
                across,
                rows["difference"].clip(lower=LEAST),
                color=style.colour,
                linestyle=style.dashes,
                marker=style.marker,
                markersize=4,
                linewidth=1.0,
                label=wrapped(labels[str(method)], 34),
            )
        if name != "recall":  # of exact attention nothing is missed
            logarithmic(axes.xaxis)
        axes.set_title(label, fontsize="small")
        axes.grid(alpha=0.25)
    logarithmic(panels[0].yaxis)  # and so all of them, which share it
    label_outer(panels, "replay, mean over layers and heads", "loss in the loop")
    legend(figure, *panels)
    return figure
