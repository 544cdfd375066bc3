"""Medians of streams from few numbers: to the resolution stated, however the parts are merged."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from retrace.analyze.metrics.histogram import BINS, LEAST, MOST, RESOLUTION, Histogram

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def heavy(*shape: int) -> Array:
    """Samples over ten powers of ten, and zeros."""
    rng = np.random.default_rng(0)
    samples = 10 ** rng.uniform(-6, 4, shape) * (rng.random(shape) > 0.1)
    return samples.astype(np.float32)


def same(one: Histogram, other: Histogram) -> bool:
    """Whether both are to the byte."""
    parts = zip((one.places, one.counts), (other.places, other.counts), strict=True)
    return one.shape == other.shape and all(a.tobytes() == b.tobytes() for a, b in parts)


def medians_of(histogram: Histogram) -> npt.NDArray[np.float64]:
    """The median of each stream, or the mean of the two in its middle; NaN of none."""
    lower, upper, weight = histogram.around(50)
    return (1 - weight) * lower + weight * upper


@pytest.mark.parametrize("samples", [1, 2, 3, 100, 1001])
def test_medians(samples: int) -> None:
    values = heavy(4, 3, samples)
    found, wanted = medians_of(Histogram.of(values)), np.median(values.astype(np.float64), axis=-1)
    np.testing.assert_allclose(found, wanted, rtol=RESOLUTION)


def test_every_merge_gives_the_same_bytes() -> None:
    values = heavy(2, 3, 600)
    parts = [Histogram.of(part) for part in np.split(values, [1, 20, 400], axis=-1)]
    for order in itertools.permutations(parts):
        merged = order[0]
        for part in order[1:]:
            merged = merged.merge(part)
        assert same(merged, Histogram.of(values))
    assert same(Histogram.of(values[..., :0]).merge(parts[0]), parts[0])


def test_heads_side_by_side_and_budgets_apart() -> None:
    values = heavy(3, 5, 50)
    apart = [Histogram.of(values[:, :2]), Histogram.of(values[:, 2:])]
    assert same(Histogram.stack(apart), Histogram.of(values))
    some = Histogram.of(values[[0, 2]]).spread([0, 2], 3)
    medians = medians_of(some)
    assert np.isnan(medians[1]).all()
    assert (medians[[0, 2]] == medians_of(Histogram.of(values))[[0, 2]]).all()


def test_what_is_never_counted_and_where_bins_end() -> None:
    nan = np.float32(np.nan)
    values = np.array([[nan, 1, nan], [nan] * 3, [0, LEAST / 2, 0], [np.inf, 2 * MOST, 9]])
    histogram = Histogram.of(values.astype(np.float32))
    assert histogram.totals().tolist() == [1, 0, 3, 3]
    medians = medians_of(histogram)
    assert medians[0] == pytest.approx(1, rel=RESOLUTION) and np.isnan(medians[1])
    assert medians[2:].tolist() == [0, MOST]
    assert (histogram.places % BINS).max() == BINS - 1


def test_every_bin_is_as_narrow_as_stated() -> None:
    values = np.geomspace(LEAST, MOST * 0.999, 100_001).astype(np.float32)
    medians = medians_of(Histogram.of(values[:, None]))
    np.testing.assert_allclose(medians, values.astype(np.float64), rtol=RESOLUTION)
