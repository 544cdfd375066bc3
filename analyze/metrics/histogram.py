"""How figures are distributed over a stream, in few numbers that add up part by part.

Bins are those of float32's own bits: `BITS` of the mantissa, so that each power of two has 2^BITS
bins of equal width. A figure is known to half a bin, which is `RESOLUTION` of it at the most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

BITS = 6
RESOLUTION = 2.0 ** -(BITS + 1)
"""Largest error of a figure that is read off its bin, in proportion to it: 0.8 %."""
LEAST, MOST = 2.0**-24, 2.0**16
"""What is smaller counts as 0, and what is larger as this."""

SHIFT = 23 - BITS
"""Bits of a float32 that do not tell its bin."""
FIRST_BIN, _LAST = (int(np.float32(end).view(np.int32)) >> SHIFT for end in (LEAST, MOST))
BINS = _LAST - FIRST_BIN + 2
"""The first is for what counts as 0."""


@dataclass(frozen=True)
class Histogram:
    """Counts of many streams (any shape), only those that are not 0."""

    shape: tuple[int, ...]
    places: npt.NDArray[np.int64]
    """Stream times `BINS` plus bin, ascending."""
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, values: npt.NDArray[np.float32]) -> Self:
        """Of the samples (..., samples), 0 or larger; NaN is never counted."""
        shape = values.shape[:-1]
        values = np.ascontiguousarray(values, np.float32)
        bins = (values.view(np.int32) >> SHIFT) - FIRST_BIN + 1
        streams = np.arange(int(np.prod(shape))).reshape(*shape, 1)
        every = np.bincount((streams * BINS + bins.clip(0, BINS - 1))[~np.isnan(values)])
        return cls._of_counts(shape, every)

    @classmethod
    def of_bins(cls, counts: npt.NDArray[np.int32]) -> Self:
        """Of the counts in all bins (..., `BINS`)."""
        return cls._of_counts(counts.shape[:-1], counts.ravel().astype(np.int64))

    @classmethod
    def _of_counts(cls, shape: tuple[int, ...], counts: npt.NDArray[np.int64]) -> Self:
        places = np.nonzero(counts)[0]
        return cls(shape, places, counts[places])

    @classmethod
    def checked(
        cls, shape: tuple[int, ...], places: npt.NDArray[Any], counts: npt.NDArray[Any]
    ) -> Self:
        """Of what a file holds, which anybody may have written.

        Raises:
            ValueError: it is none.
        """
        if not places.dtype == counts.dtype == np.int64 or places.shape != counts.shape:
            raise ValueError("Places and counts are not those of a histogram.")
        inside = places.ndim == 1 and (np.diff(places, prepend=-1) > 0).all()
        if not inside or (places >= int(np.prod(shape)) * BINS).any() or (counts < 1).any():
            raise ValueError("Places or counts are none of these streams.")
        return cls(shape, places, counts)

    def merge(self, other: Self) -> Self:
        """Of both parts together."""
        places, which = np.unique(np.concatenate([self.places, other.places]), return_inverse=True)
        counts = np.zeros(len(places), np.int64)
        np.add.at(counts, which, np.concatenate([self.counts, other.counts]))
        return type(self)(self.shape, places, counts)

    def spread(self, places: Sequence[int], size: int) -> Self:
        """The entries of the first axis at these places, ascending, of a longer one."""
        each = int(np.prod(self.shape[1:])) * BINS
        moved = np.array(places, np.int64)[self.places // each] * each + self.places % each
        return type(self)((size, *self.shape[1:]), moved, self.counts)

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """Several side by side along the last axis."""
        widths = [part.shape[-1] for part in parts]
        whole, places, before = sum(widths), [], 0
        for part, width in zip(parts, widths, strict=True):
            stream, bin_ = np.divmod(part.places, BINS)
            row, column = np.divmod(stream, width)
            places.append((row * whole + column + before) * BINS + bin_)
            before += width
        joined, counts = np.concatenate(places), np.concatenate([part.counts for part in parts])
        order = joined.argsort(kind="stable")
        return cls((*parts[0].shape[:-1], whole), joined[order], counts[order])

    def totals(self) -> npt.NDArray[np.int64]:
        """How many samples each stream has."""
        totals = np.zeros(int(np.prod(self.shape)), np.int64)
        np.add.at(totals, self.places // BINS, self.counts)
        return totals.reshape(self.shape)

    def around(
        self, percent: float
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The two samples of each stream that a percentile lies between, NaN of none, and the
        weight of the second, as NumPy's `percentile` has them by default."""
        totals = self.totals()
        known = totals > 0
        place = (totals[known] - 1) * (percent / 100)
        lower = place.astype(np.int64)
        until, before = self.counts.cumsum(), (totals.ravel().cumsum().reshape(self.shape) - totals)
        samples = []
        for number in (lower, np.minimum(lower + 1, totals[known] - 1)):
            # The bin in which the sample of this number, counted over all streams, is.
            bins = self.places[np.searchsorted(until, before[known] + number, side="right")] % BINS
            samples.append(np.full(self.shape, np.nan))
            samples[-1][known] = _middle(bins)
        weight = np.zeros(self.shape)
        weight[known] = place - lower
        return samples[0], samples[1], weight


def _middle(bins: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The figure in the middle of each bin."""
    bits = ((bins - 1 + FIRST_BIN) << SHIFT) + (1 << (SHIFT - 1))
    middle = bits.astype(np.int32).view(np.float32).astype(np.float64)
    return np.where(bins == 0, 0.0, np.where(bins == BINS - 1, MOST, middle))
