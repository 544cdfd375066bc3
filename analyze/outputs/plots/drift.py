"""Pictures of a comparison: drift over depth, and what it costs over positions."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from retrace.analyze.outputs.plots.files import save_picture
from retrace.analyze.outputs.plots.style import (
    label_outer,
    legend,
    panel_grid,
    plain_numbers,
    styles_of,
    wrapped,
)
from retrace.analyze.tables.drift import Drift

DPI = 130
BINS = 32
"""Most points of a line over positions."""


def draw_drift(drift: Drift, folder: Path) -> list[Path]:
    """Draw every plot of a comparison into a folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in (
        ("drift-by-layer", drift_by_layer(drift)),
        ("likelihood-by-position", likelihood_by_position(drift)),
    ):
        files.append(folder / f"{name}.png")
        save_picture(figure, files[-1], DPI)
    return files


def drift_by_layer(drift: Drift) -> Figure:
    """Relative drift of queries, keys, values and attention outputs over layers: mean over heads
    and positions."""
    table = drift.table()
    tensors = [name for name in table.columns if name not in ("run", "layer", "module")]
    figure, panels = panel_grid(len(tensors), width=3.0, height=2.6)
    figure.suptitle("Drift from the exact run, mean over heads and positions", fontsize="medium")
    styles = styles_of(table["run"].unique())
    for axes, tensor in zip(panels, tensors, strict=True):
        for run, rows in table.groupby("run", sort=False):
            style = styles[str(run)]
            axes.plot(
                rows["layer"],
                rows[tensor],
                **style.line,
                markersize=3,
                linewidth=1.2,
                label=wrapped(str(run), 34),
            )
        axes.set_title(tensor, fontsize="small")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
    panels[0].set_ylim(bottom=0.0)  # and so all of them, which share it
    plain_numbers(panels[0])
    label_outer(panels, "layer", "||x' - x|| / ||x||")
    legend(figure, *panels)
    return figure


def likelihood_by_position(drift: Drift) -> Figure:
    """How much less likely the next token is than in the exact run, over positions."""
    figure, panels = panel_grid(1, width=6.0, height=3.2)
    [axes] = panels
    figure.suptitle("Loss of likelihood against the exact run", fontsize="medium")
    rows = drift.likelihoods
    styles = styles_of(rows["run"].unique())
    edges = np.linspace(0, rows["position"].max() + 1, BINS + 1)
    for run, part in rows.groupby("run", sort=False):
        place = np.digitize(part["position"], edges)
        means = part.groupby(place)[["position", "difference"]].mean()
        style = styles[str(run)]
        axes.plot(
            means["position"],
            means["difference"],
            color=style.colour,
            linestyle=style.dashes,
            linewidth=1.2,
            label=wrapped(str(run), 60),
        )
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    plain_numbers(axes)
    axes.grid(alpha=0.25)
    label_outer(panels, "position", "nats per token")
    legend(figure, *panels)
    return figure
