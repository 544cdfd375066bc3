"""A picture of which pattern of blocks covers each head's attention best."""

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from retrace.analyze.metrics.patterns import KINDS, SHARE
from retrace.analyze.outputs.plots.style import space
from retrace.analyze.tables.figures import Figures

COLOURS = dict(zip(KINDS, ("#56B4E9", "#E69F00", "#009E73", "#CC79A7"), strict=True))
"""Of Okabe and Ito, as the report has them."""


def pattern_map(results: Figures) -> Figure:
    """Layers by heads, a colour for each pattern."""
    rows = results.head_patterns
    best = rows[rows["best"]].assign(place=lambda own: own["pattern"].astype(str).map(KINDS.index))
    cells = best.pivot_table("place", "layer", "head", "first")
    layers, heads = cells.shape
    size = (
        float(np.clip(0.3 * heads + 2.4, 4.5, 9.0)),
        float(np.clip(0.17 * layers + 1.8, 3.0, 11.0)),
    )
    figure = Figure(figsize=size, layout="constrained")
    space(figure)
    figure.suptitle(
        f"Pattern that covers each head best, {results.run['protocol']},\n"
        f"with {SHARE:.0%} of the pairs of blocks besides the first and the own",
        fontsize="medium",
    )
    axes = figure.subplots()
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
    figure.legend(
        handles=[
            Patch(color=colour, label=f"{kind} ({counts.get(kind, 0):,})")
            for kind, colour in COLOURS.items()
        ],
        loc="outside lower center",
        ncols=len(KINDS),
        fontsize="small",
        frameon=False,
    )
    return figure
