"""TurboQuant against its definition and its published constants (arXiv:2504.19874)."""

import math

import numpy as np
import pytest
import torch

from retrace.analyze.caches.turboquant import TurboQuant, code_book, nearest_levels
from retrace.analyze.methods.options.cache import Cache

CHANNELS = 512


def directions(count: int, channels: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, channels, generator=generator), dim=-1)


@pytest.mark.parametrize(
    ("bits", "levels"),
    # Max (1960), table I: of a normal variable, and 0.453 and 1.51 of the paper's section 3.1.
    [(1, [0.7979]), (2, [0.4528, 1.510]), (3, [0.2451, 0.7560, 1.344, 2.152])],
)
def test_code_book_of_many_channels_is_that_of_a_normal_variable(
    bits: int, levels: list[float]
) -> None:
    found = code_book(1 << 14, bits) * math.sqrt(1 << 14)
    assert found[2 ** (bits - 1) :] == pytest.approx(levels, abs=2e-3)
    assert found == pytest.approx(-found[::-1])


@pytest.mark.parametrize("channels", [3, 8, 64])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_levels_are_means_of_what_they_stand_for(channels: int, bits: int) -> None:
    levels = code_book(channels, bits)
    sample = directions(400_000, channels, 1)[:, 0].double().numpy()
    codes = np.abs(sample[:, None] - levels).argmin(axis=1)
    means = [sample[codes == i].mean() for i in range(2**bits)]
    assert levels == pytest.approx(means, abs=6e-3 / math.sqrt(channels) * 2**bits)


def test_three_channels_are_uniform() -> None:
    # Archimedes: a coordinate of the sphere is uniform, so that the levels are evenly spaced.
    assert code_book(3, 3) == pytest.approx((np.arange(8) - 3.5) / 4, abs=1e-4)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_mean_squared_error(bits: int, error: float) -> None:
    vectors = directions(3000, CHANNELS, 2)
    found = (TurboQuant(bits).rounded(vectors) - vectors).double().square().sum(dim=-1).mean()
    assert float(found) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.56), (3, 0.18), (4, 0.054)])
def test_inner_products(bits: int, error: float) -> None:
    """0.047 / d is published for 4 bits, from an error of 3 bits that is rounded to 0.03: times
    pi / 2 the error itself, 0.0345, is 0.054."""
    vectors, queries = directions(2000, CHANNELS, 3), directions(200, CHANNELS, 4)
    apart = (queries @ (TurboQuant(bits, unbiased=True).rounded(vectors) - vectors).T).double()
    assert float(apart.square().mean()) * CHANNELS == pytest.approx(error, rel=0.06)


def test_inner_products_are_unbiased() -> None:
    """Of a vector with a query near it the levels alone give too little, with the sketch they do
    not: over vectors, whose projections are as good as drawn anew."""
    vectors = directions(4000, 128, 5)
    for unbiased, share in ((False, 0.6366), (True, 1.0)):
        kept = (TurboQuant(2 if unbiased else 1, unbiased).rounded(vectors) * vectors).sum(dim=-1)
        assert float(kept.mean()) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_definition(bits: int, unbiased: bool) -> None:
    """Each coordinate by itself, in float64, with the rotation and the sketch that are found from
    what they do."""
    from retrace.analyze.caches.turboquant import ROTATION_SEED, SKETCH_SEED

    channels, count = 24, 9
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(count, channels, generator=generator) * 7
    vectors[3] = 0.0

    def normal(seed: int) -> torch.Tensor:
        own = torch.Generator().manual_seed(seed)
        return torch.randn(channels, channels, generator=own, dtype=torch.float64)

    basis, triangle = np.linalg.qr(normal(ROTATION_SEED).numpy())
    turn = basis * np.sign(np.diag(triangle))
    assert turn @ turn.T == pytest.approx(np.eye(channels), abs=1e-12)
    sketch = normal(SKETCH_SEED).numpy()
    levels = code_book(channels, bits - unbiased) if bits > unbiased else np.zeros(1)
    expected = np.zeros((count, channels))
    for i, vector in enumerate(vectors.double().numpy()):
        norm = float(np.linalg.norm(vector))
        if not norm:
            continue
        turned = turn @ (vector / norm)
        codes = np.abs(turned[:, None] - levels).argmin(axis=1)
        kept = turn.T @ levels[codes]
        if unbiased:
            rest = vector / norm - kept
            length = float(np.float16(np.linalg.norm(rest)))
            signs = np.where(sketch @ rest < 0, -1, 1)
            kept = kept + math.sqrt(math.pi / 2) / channels * length * (sketch.T @ signs)
        expected[i] = float(np.float16(norm)) * kept
    found = TurboQuant(bits, unbiased).rounded(vectors)
    assert found.double().numpy() == pytest.approx(expected, abs=2e-4)


def test_bytes() -> None:
    assert Cache.parse("turboquant:3").keys.bytes(64) == 64 * 3 / 8 + 2
    assert Cache.parse("turboquant-prod:3").keys.bytes(64) == 64 * 3 / 8 + 4


def test_no_bits_are_zeros() -> None:
    assert not nearest_levels(directions(2, 8, 0), 0).any()
