"""What a page holds of the patterns of heads."""

from typing import Any

import numpy as np

from retrace.analyze.metrics.patterns import ENOUGH, KINDS, PATTERNS, SHARE
from retrace.analyze.outputs.plots.patterns import COLOURS
from retrace.analyze.outputs.report.packed import Packed
from retrace.analyze.tables.figures import Figures

BITS = 15
"""Of a share's mantissa: four decimals are shown."""


def patterns_of(
    results: Figures, layers: list[int], heads: int, packed: Packed
) -> dict[str, Any] | None:
    """The places of grids (layers, heads): `best`, the number of each head's among `kinds`, and
    `held` by each pattern, NaN where there is none; None of results without any."""
    rows = results.head_patterns
    rows = rows[rows["layer"].isin(layers) & (rows["head"] < heads)]
    if rows.empty:
        return None
    best, held = np.full((len(layers), heads), np.nan), {}
    for pattern in PATTERNS:
        own = rows[rows["pattern"] == pattern]
        at = np.searchsorted(layers, own["layer"]), own["head"].to_numpy()
        grid = np.full((len(layers), heads), np.nan)
        grid[at] = own["mean"]
        held[pattern] = packed.add(grid, BITS)
        if pattern in KINDS:
            best[at] = np.where(own["best"], KINDS.index(pattern), best[at])
    return {
        "share": SHARE,
        "enough": ENOUGH,
        "kinds": list(KINDS),
        "colours": [COLOURS[kind] for kind in KINDS],
        "best": packed.add(best),
        "held": held,
    }
