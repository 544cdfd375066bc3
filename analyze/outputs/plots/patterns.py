"""A picture of which pattern of blocks covers each head's attention best."""

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from retrace.analyze.metrics.patterns import KINDS, SHARE
from retrace.analyze.outputs.plots.style import Onto, Sheet
from retrace.analyze.tables.figures import Figures

COLOURS = dict(zip(KINDS, ("#56B4E9", "#F0E442", "#009E73", "#0072B2"), strict=True))
"""Of Okabe and Ito, in the report too; each has a lightness of its own, for grey."""


def pattern_map(results: Figures, onto: Onto = None) -> Figure:
    """Layers by heads, a colour for each pattern."""
    rows = results.head_patterns
    best = rows[rows["best"]].assign(place=lambda own: own["pattern"].astype(str).map(KINDS.index))
    cells = best.pivot_table("place", "layer", "head", "first")
    layers, heads = cells.shape
    size = (
        float(np.clip(0.3 * heads + 2.4, 4.5, 9.0)),
        float(np.clip(0.17 * layers + 1.8, 3.0, 11.0)),
    )
    sheet = Sheet.of(size, 1, 1, onto)
    sheet.title(
        f"Pattern that covers each head best, {results.run['protocol']},\n"
        f"with {SHARE:.0%} of the pairs of blocks besides the first and the own"
    )
    [axes] = sheet.panels
    axes.imshow(
        np.ma.masked_invalid(cells.to_numpy(dtype=float)),
        aspect="auto",
        cmap=ListedColormap([*COLOURS.values()]).with_extremes(bad="0.8"),
        vmin=-0.5,
        vmax=len(KINDS) - 0.5,
        interpolation="nearest",
    )
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    for axis, names in ((axes.xaxis, cells.columns), (axes.yaxis, cells.index)):
        step = -(-len(names) // 16)
        axis.set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])
        axis.set_tick_params(labelsize="small")
    counts = best["pattern"].astype(str).value_counts()
    for kind, colour in COLOURS.items():
        axes.scatter([], [], marker="s", color=colour, label=f"{kind} ({counts.get(kind, 0):,})")
    sheet.legend()
    return sheet.figure
