"""Which figures can be: the others are refused by name wherever they arise, and never kept."""

import numpy as np
import numpy.typing as npt

from retrace.analyze.metrics.locality import FIGURES
from retrace.analyze.metrics.moments import Moments
from retrace.analyze.metrics.registry import BY_NAME

ROUNDING = 1e-5
"""What a share may come to above 1. No metric is below 0, or infinite."""


def most_of(metric: str) -> float:
    """The largest number that a metric can come to."""
    return float(min(end_of(metric) + ROUNDING, np.finfo(np.float64).max))


def end_of(metric: str) -> float:
    """Where the range of a metric ends, which begins at 0, rounding left aside."""
    if metric in FIGURES:
        return FIGURES[metric].most
    known = BY_NAME.get(metric)  # there may be other names in a file that anybody wrote
    return np.inf if known is None or known.most is None else known.most


def impossible(metric: str, moments: Moments) -> npt.NDArray[np.bool_]:
    """Which streams of a metric's moments are of no figures that can be."""
    count, mean, squares = moments.count, moments.mean, moments.squares
    with np.errstate(invalid="ignore"):
        right = (count >= 0) & np.isfinite(count)
        right &= (mean >= 0) & (mean <= most_of(metric)) & (squares >= 0) & np.isfinite(squares)
    return ~right
