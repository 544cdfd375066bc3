"""Pictures of a comparison: drift over depth, and what it costs over positions."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from retrace.analyze.outputs.plots.files import PNG, save_pictures
from retrace.analyze.outputs.plots.style import (
    Onto,
    from_zero,
    panel_grid,
    plain_numbers,
    styles_of,
    wrapped,
)
from retrace.analyze.tables.drift import Drift

BINS = 32
"""Most points of a line over positions."""


def draw_drift(drift: Drift, folder: Path, formats: Sequence[str] = (PNG,)) -> list[Path]:
    """Draw every plot of a comparison into a folder, in each of the formats; returns the files."""
    pictures = {
        "drift-by-layer": partial(drift_by_layer, drift),
        "likelihood-by-position": partial(likelihood_by_position, drift),
    }
    return save_pictures(pictures, folder, formats)


def drift_by_layer(drift: Drift, onto: Onto = None) -> Figure:
    """Relative drift of queries, keys, values and attention outputs over layers: mean over heads
    and positions."""
    table = drift.table()
    tensors = [name for name in table.columns if name not in ("run", "layer", "module")]
    sheet = panel_grid(len(tensors), width=3.0, height=2.6, onto=onto)
    sheet.title("Drift from the exact run, mean over heads and positions")
    styles = styles_of(table["run"].unique())
    for axes, tensor in zip(sheet.panels, tensors, strict=True):
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
    from_zero(sheet.panels)
    plain_numbers(*sheet.panels)
    sheet.label_outer("layer", "||x' - x|| / ||x||")
    sheet.legend()
    return sheet.figure


def likelihood_by_position(drift: Drift, onto: Onto = None) -> Figure:
    """How much less likely the next token is than in the exact run, over positions."""
    sheet = panel_grid(1, width=6.0, height=3.2, onto=onto)
    [axes] = sheet.panels
    sheet.title("Loss of likelihood against the exact run")
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
    sheet.label_outer("position", "nats per token")
    sheet.legend()
    return sheet.figure
