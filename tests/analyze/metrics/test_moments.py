"""Mean and variance of a stream, merged part by part."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrace.analyze.metrics.moments import Moments, empty

numbers = st.floats(-1e6, 1e6, width=32)
parts_of_a_stream = st.lists(st.lists(numbers, max_size=9), min_size=1, max_size=8)


def moments(samples: list[float]) -> Moments:
    """Moments of all samples of one stream."""
    values = torch.tensor([samples], dtype=torch.float64)
    return Moments.of(values, torch.ones(values.shape, dtype=torch.bool))


def assert_close(ours: Moments, samples: list[float]) -> None:
    scale = max(1.0, max(map(abs, samples), default=0.0))
    assert ours.count.tolist() == [len(samples)]
    if samples:
        assert abs(ours.mean[0] - np.mean(samples)) <= 1e-12 * scale
        assert abs(ours.std()[0] - np.std(samples)) <= 1e-7 * scale
    else:
        assert np.isnan(ours.std()[0])


@given(parts_of_a_stream)
def test_any_split(parts: list[list[float]]) -> None:
    whole = empty((1,))
    for part in parts:
        whole = whole.merge(moments(part))
    assert_close(whole, [x for part in parts for x in part])


@given(parts_of_a_stream, st.randoms(use_true_random=False))
def test_any_order(parts: list[list[float]], random: "np.random.Generator") -> None:
    shuffled = list(parts)
    random.shuffle(shuffled)
    whole, other = empty((1,)), empty((1,))
    for part, other_part in zip(parts, shuffled, strict=True):
        whole, other = whole.merge(moments(part)), other.merge(moments(other_part))
    scale = max([1.0, *(abs(x) for part in parts for x in part)])
    np.testing.assert_allclose(whole.mean, other.mean, rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose(whole.std(), other.std(), rtol=1e-12, atol=1e-7 * scale)


def test_a_large_mean_does_not_swamp_a_small_deviation() -> None:
    samples = [1e6 + x for x in np.random.default_rng(0).normal(size=1000)]
    whole = empty((1,))
    for start in range(0, 1000, 7):
        whole = whole.merge(moments(samples[start : start + 7]))
    np.testing.assert_allclose(whole.std(), np.std(samples), rtol=1e-9)


def test_what_is_not_counted() -> None:
    values = torch.tensor([[1.0, 100.0, 3.0, torch.nan], [5.0, torch.nan, torch.nan, torch.nan]])
    found = Moments.of(values, torch.tensor([True, False, True, True]))
    assert found.count.tolist() == [2, 1]
    assert found.mean.tolist() == [2, 5]
    assert found.std().tolist() == [1, 0]


def test_equal_samples_have_no_deviation() -> None:
    whole = moments([0.1] * 7)
    for count in (1, 3, 1000):
        whole = whole.merge(moments([0.1] * count))
    assert whole.std()[0] <= 1e-16
