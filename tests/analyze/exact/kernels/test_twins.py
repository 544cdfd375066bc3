"""Every kernel against the plain lines that define it."""

from collections.abc import Callable

import torch
from torch import Tensor

from retrace.analyze.exact.kernels.bound import bound, plain_bound
from retrace.analyze.exact.kernels.candidates import candidates, plain_candidates, plain_reaching
from retrace.analyze.exact.kernels.flash import flash, plain_flash
from retrace.analyze.exact.kernels.inputs import Inputs
from retrace.analyze.exact.kernels.matrix import plain_matrix, reaching
from retrace.analyze.exact.kernels.order import order, plain_order
from retrace.analyze.units.kernels.products import plain_products, products
from retrace.analyze.units.kernels.tiles import Tiles

RANKS = 5
CAPACITY = 32
TURNS = 2


def listed(found: Tensor, counts: Tensor, capacity: int = CAPACITY) -> list[list[int]]:
    """What is in each list that holds all it counts, in ascending order."""
    rows = zip(found.flatten(0, -2).tolist(), counts.flatten().tolist(), strict=True)
    return [sorted(row[:count]) if count <= capacity else [] for row, count in rows]


def test_flash(inputs: Inputs, small: Tiles) -> None:
    output, log_normalizer, maxima = flash(inputs, TURNS, small)
    expected = plain_flash(inputs, TURNS * small.keys)
    torch.testing.assert_close(output, expected[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(log_normalizer, expected[1], rtol=0, atol=5e-6)
    # Products of quarters are exact, and so are their maxima.
    assert torch.equal(maxima, expected[2])


def test_candidates(inputs: Inputs, small: Tiles) -> None:
    least = plain_bound(plain_flash(inputs, TURNS * small.keys)[2], RANKS)
    found, counts = candidates(inputs, least, CAPACITY, small)
    expected, expected_counts = plain_candidates(inputs, least, CAPACITY)
    assert torch.equal(counts, expected_counts)
    assert listed(found, counts) == listed(expected, expected_counts)


def test_full_lists_are_counted_on(make_inputs: Callable[..., Inputs], small: Tiles) -> None:
    inputs = make_inputs()
    least = torch.full(inputs.queries.shape[:2], -1e30, device=inputs.keys.device)
    found, counts = candidates(inputs, least, CAPACITY, small)
    assert torch.equal(counts, (inputs.positions + 1).expand_as(counts))
    few = counts <= CAPACITY
    expected, _ = plain_candidates(inputs, least, CAPACITY)
    assert listed(found[few], counts[few]) == listed(expected[few], counts[few])


def test_bound(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    maxima = torch.randn(12, 96, generator=generator) * 10.0 ** torch.arange(-6, 6)[:, None]
    maxima[3] = maxima[3].round()
    maxima[4, 3:] = -torch.inf
    maxima[5] = 0.0
    maxima[6] = -maxima[6].abs()
    maxima = maxima.to(device)
    for k in (1, 4, 96):
        exact = plain_bound(maxima, k)
        assert torch.equal(bound(maxima, k, bits=32), exact)
        rounded = bound(maxima, k)
        assert bool((rounded <= exact).all())
        # 20 bits are the sign, the exponent and 11 of the fraction; -0.0 becomes a subnormal.
        off = 2.0**-11 * exact.abs() + torch.finfo(torch.float32).tiny
        assert bool((exact - rounded <= off).all())


def test_order(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 60, generator=generator).mul(3).round()
    scores[1] = -0.0
    scores[1, ::3] = 0.0
    scores[2] *= 1e-30
    found, _ = plain_reaching(scores, torch.full((6,), -1e30), 60)
    shuffled = found[:, torch.randperm(60, generator=generator)].to(device)
    counts = torch.tensor([60, 60, 60, 1, 0, 7], dtype=torch.int32, device=device)
    for k in (1, 20):
        for ours, plain in zip(
            order(shuffled, counts, k, 64), plain_order(shuffled, counts, k), strict=True
        ):
            assert torch.equal(ours, plain)


def test_products(make_inputs: Callable[..., Inputs]) -> None:
    inputs = make_inputs(key_dim=24, dtype=torch.float32)
    group, rows, _ = inputs.queries.shape
    ids = torch.arange(group * rows * 19, device=inputs.keys.device).view(group, rows, 19)
    ids = ids * 7 % (len(inputs.keys) + 1) - 1
    queries, keys = inputs.queries * 1e10, inputs.keys / 3
    ours, plain = products(queries, keys, ids), plain_products(queries, keys, ids)
    torch.testing.assert_close(ours[ids >= 0], plain[ids >= 0], rtol=1e-13, atol=1e-3)
    assert products(queries, keys, ids[..., :0]).shape == (group, rows, 0)


def test_matrix(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(9, 157, generator=generator).mul(8).round()
    scores[1] = -torch.inf
    scores[2, 3:] = -torch.inf
    scores[3] = 1.0
    scores = scores.to(device)
    for groups in (24, 32, 300):
        found, counts = reaching(scores, RANKS, groups, CAPACITY)
        expected, expected_counts = plain_matrix(scores, RANKS, groups, CAPACITY)
        assert torch.equal(counts, expected_counts)
        assert listed(found, counts) == listed(expected, expected_counts)
