"""What the worst queries come to: percentiles of a metric over queries, and which is the worst.

Errors have bins of `retrace.analyze.metrics.histogram`. Shares have those of their odds
s / (1 - s), which are as fine near 1 as near 0: a share is known to `RESOLUTION` of what is
smaller, itself or what it lacks of 1; below 2^-24 it counts as 0, and above 1 - 2^-16 as 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrace.analyze.metrics.histogram import MOST, Histogram
from retrace.analyze.metrics.registry import BY_NAME, TAILED
from retrace.analyze.units.constants import constant

PERCENTILES = (5, 50, 95)
_SHARES = [i for i, metric in enumerate(TAILED) if BY_NAME[metric].most == 1.0]
_SIGNS = tuple(-BY_NAME[metric].better for metric in TAILED)
"""Times a figure: the more, the worse."""
_LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Worst:
    """The worst figure of many streams (arrays of one shape) and the query that has it: of several
    alike the one of the lowest sequence, and in it the first."""

    figure: npt.NDArray[np.float32]
    """NaN of no queries."""
    sequence: npt.NDArray[np.int64]
    """-1 of none."""
    position: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tails:
    """Distributions over queries of the metrics of `TAILED`, and their worst queries; both of
    streams (budgets, `TAILED`, heads)."""

    histogram: Histogram
    """Of errors, and of the odds of shares."""
    worst: Worst

    @classmethod
    def of(
        cls,
        figures: npt.NDArray[np.float32],
        positions: npt.NDArray[np.int64],
        sequence: int,
    ) -> Self:
        """Of a sequence's queries.

        Args:
            figures: (budgets, `TAILED`, heads, queries); NaN is never counted.
            positions: (queries,) ascending.
            sequence: the number of theirs.
        """
        every = torch.from_numpy(figures)
        worst, position = worst_of(every, torch.from_numpy(positions))
        binned = Histogram.of(odds_of_shares(every).numpy())
        return cls(binned, _worst(worst.numpy(), position.numpy(), sequence))

    @classmethod
    def of_parts(
        cls,
        counts: npt.NDArray[np.int32],
        worst: npt.NDArray[np.float32],
        position: npt.NDArray[np.int64],
        sequence: int,
    ) -> Self:
        """Of counts in all bins (..., bins), and of the worst figure and its position."""
        return cls(Histogram.of_bins(counts), _worst(worst, position, sequence))

    @classmethod
    def empty(cls, budgets: int, heads: int) -> Self:
        """Of no queries."""
        nothing = np.empty((budgets, len(TAILED), heads, 0), np.float32)
        none = np.full(nothing.shape[:-1], np.nan, np.float32)
        sequence, position = np.full((2, *none.shape), -1)
        return cls(Histogram.of(nothing), Worst(none, sequence, position))

    def merge(self, other: Self) -> Self:
        """Of both parts together, in whatever order."""
        ours, theirs = self.worst, other.worst
        bad, worse = (_badness(one.figure) for one in (ours, theirs))
        earlier = (theirs.sequence < ours.sequence) | (
            (theirs.sequence == ours.sequence) & (theirs.position < ours.position)
        )
        other_is = (worse > bad) | ((worse == bad) & earlier & (theirs.sequence >= 0))
        return type(self)(
            self.histogram.merge(other.histogram),
            Worst(
                *(
                    np.where(other_is, getattr(theirs, name), getattr(ours, name))
                    for name in ("figure", "sequence", "position")
                )
            ),
        )

    def spread(self, places: Sequence[int], size: int) -> Self:
        """The budgets at these places, ascending, of more of them."""
        whole = type(self).empty(size, self.worst.figure.shape[-1]).worst
        for name, part in vars(self.worst).items():
            getattr(whole, name)[list(places)] = part
        return type(self)(self.histogram.spread(places, size), whole)

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """The heads of several side by side."""
        worst = (
            np.concatenate([getattr(part.worst, name) for part in parts], axis=-1)
            for name in ("figure", "sequence", "position")
        )
        return cls(Histogram.stack([part.histogram for part in parts]), Worst(*worst))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All of it, by name."""
        return {
            "places": self.histogram.places,
            "counts": self.histogram.counts,
            **vars(self.worst),
        }

    @classmethod
    def checked(cls, budgets: int, heads: int, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Of what `arrays` gave, from a file that anybody may have written.

        Raises:
            ValueError: they are none of that.
        """
        shape = (budgets, len(TAILED), heads)
        histogram = Histogram.checked(shape, arrays["places"], arrays["counts"])
        worst = Worst(arrays["figure"], arrays["sequence"], arrays["position"])
        kinds = (worst.figure, np.float32), (worst.sequence, np.int64), (worst.position, np.int64)
        if not all(part.dtype == kind and part.shape == shape for part, kind in kinds):
            raise ValueError("The worst queries are not those of these streams.")
        known = histogram.totals() > 0
        right = (worst.figure >= 0) & (worst.sequence >= 0) & (worst.position >= 0)
        if not np.where(known, right, np.isnan(worst.figure)).all():
            raise ValueError("The worst queries are of figures that cannot be.")
        return cls(histogram, worst)

    def counts(self) -> npt.NDArray[np.int64]:
        """How many queries each stream has."""
        return self.histogram.totals()

    def percentile(self, percent: float) -> npt.NDArray[np.float64]:
        """What so many per cent of the queries do not exceed, between two of them by a straight
        line; NaN of none."""
        lower, upper, weight = self.histogram.around(percent)
        for figures in (lower, upper):
            for i in _SHARES:
                odds = figures[:, i]
                figures[:, i] = np.where(odds >= MOST, 1.0, odds / (1 + odds))
        found: npt.NDArray[np.float64] = (1 - weight) * lower + weight * upper
        return found

    def medians(self, metric: str) -> npt.NDArray[np.float64]:
        """The median of a metric (budgets, heads)."""
        return self.percentile(50)[:, TAILED.index(metric)]


@dataclass(frozen=True)
class EveryQuery:
    """What each of some queries of a sequence comes to. Tails are told of many at once: of a
    block's few, going through the bins would take longer than counting."""

    figures: npt.NDArray[np.float32]
    """(budgets, `TAILED`, heads, queries); NaN is never counted."""
    positions: npt.NDArray[np.int64]
    """(queries,) ascending."""
    sequence: int

    def spread(self, places: Sequence[int], size: int) -> Self:
        """The budgets at these places of more of them."""
        figures = np.full((size, *self.figures.shape[1:]), np.nan, np.float32)
        figures[list(places)] = self.figures
        return type(self)(figures, self.positions, self.sequence)


def tails_of(parts: Sequence[EveryQuery]) -> Tails:
    """The tails of consecutive queries of one sequence."""
    figures = np.concatenate([part.figures for part in parts], axis=-1)
    positions = np.concatenate([part.positions for part in parts])
    return Tails.of(figures, positions, parts[0].sequence)


def odds_of_shares(figures: Tensor) -> Tensor:
    """What is counted in bins of figures (budgets, `TAILED`, heads, queries): errors, and the odds
    of shares."""
    binned = figures.clone()
    for i in _SHARES:
        shares = figures[:, i].clamp(0.0, 1.0)
        binned[:, i] = shares / (1 - shares)
    return binned


def worst_of(figures: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The worst of figures (budgets, `TAILED`, heads, queries), where NaN is never counted, and the
    first position (queries,) that has it."""
    signs = constant(_SIGNS, figures.device).to(figures.dtype)[:, None]
    bad = figures * signs[..., None]
    bad = bad.masked_fill(bad.isnan(), -torch.inf)
    worst = bad.amax(dim=-1)
    # Which of equal numbers `argmax` finds, a GPU does not say.
    behind = bad < worst[..., None]
    position = positions.expand(bad.shape).masked_fill(behind, _LAST).amin(dim=-1)
    return (worst * signs).masked_fill(worst == -torch.inf, torch.nan), position


def _badness(figures: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """How bad figures (budgets, `TAILED`, heads) are."""
    signs = np.array(_SIGNS, np.float32)[:, None]
    return np.where(np.isnan(figures), np.float32(-np.inf), figures * signs)


def _worst(
    figure: npt.NDArray[np.float32], position: npt.NDArray[np.int64], sequence: int
) -> Worst:
    """Of one sequence."""
    none = np.isnan(figure)
    return Worst(figure, np.where(none, -1, sequence), np.where(none, -1, position))
