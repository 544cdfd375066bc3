"""What methods in the loop cost, over what replay says of them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from retrace.analyze.outputs.plots.files import PNG, save_pictures
from retrace.analyze.outputs.plots.style import (
    Onto,
    logarithmic,
    panel_grid,
    styles_of,
    wrapped,
)
from retrace.analyze.units.costs import NOT_CHARGED, SERVING_DTYPE
from retrace.capture.tables.evaluation import Evaluation

AGAINST = {
    "error_norm": "error norm",
    "attention_fraction": "attention mass lost",
    "recall": "keys missed, 1 - recall",
    "bytes_ratio": f"bytes read, of full attention\n(a cache in {SERVING_DTYPE})",
}
"""Replay's figures, and how the plot names them."""
LEAST = 1e-4
"""In nats: differences below are drawn there, since axes are logarithmic."""


def draw_evaluation(
    evaluation: Evaluation, folder: Path, formats: Sequence[str] = (PNG,)
) -> list[Path]:
    """Draw the plot into a folder, in each of the formats; returns the files."""
    pictures = {"loss-by-replay": partial(loss_by_replay, evaluation)}
    return save_pictures(pictures, folder, formats)


def loss_by_replay(evaluation: Evaluation, onto: Onto = None) -> Figure:
    """The loss of likelihood over each of replay's figures, a line through a method's budgets."""
    points = evaluation.points
    sheet = panel_grid(len(AGAINST), width=3.2, height=3.2, share_x=False, onto=onto)
    sheet.title("Loss of likelihood in the loop, nats per token")
    styles = styles_of(points["method"].unique())
    charged = points["charged"] if "charged" in points else points["method"].notna()
    labels = {
        str(method): str(method) if rows.all() else f"{method} ({NOT_CHARGED})"
        for method, rows in charged.groupby(points["method"])
    }
    for axes, (name, label) in zip(sheet.panels, AGAINST.items(), strict=True):
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
    logarithmic(sheet.panels[0].yaxis)  # and so all of them, which share it
    sheet.label_outer("replay, mean over layers and heads", "loss in the loop")
    sheet.legend()
    return sheet.figure
