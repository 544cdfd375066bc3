"""The whole pass, and selection from scores, against plain PyTorch."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from retrace.analyze.exact.kernels import exact
from retrace.analyze.exact.kernels import select as selection
from retrace.analyze.exact.kernels.flash import plain_flash
from retrace.analyze.exact.kernels.inputs import Inputs
from retrace.analyze.exact.kernels.order import plain_order

RANKS = 6


def by_sorting(scores: Tensor, k: int) -> Tensor:
    """Ids of the k largest finite scores of each row, ties to the lower."""
    scores = torch.nn.functional.pad(scores, (0, max(0, k - scores.shape[-1])), value=-torch.inf)
    best = torch.sort(scores, dim=-1, descending=True, stable=True)
    ids, values = best.indices[..., :k], best.values[..., :k]
    return ids.masked_fill(values == -torch.inf, -1)


def assert_right(inputs: Inputs, ranks: int) -> None:
    if not inputs.keys.is_cuda:  # The interpreter sorts a list in a tenth of a second.
        few = slice(None, None, -(-len(inputs.positions) // 4))
        inputs = replace(
            inputs,
            queries=inputs.queries[:, few].contiguous(),
            positions=inputs.positions[few].contiguous(),
            first=inputs.first[few].contiguous(),
        )
    ids, scores, log_normalizer, output = exact.answers(inputs, ranks)
    products = inputs.products()
    assert torch.equal(ids, by_sorting(products, ranks))
    # Products of quarters are exact, and so are their scores.
    listed = inputs.scores(products.double()).gather(-1, ids.clamp(min=0))
    assert torch.equal(scores, listed.masked_fill(ids < 0, -torch.inf))
    expected = plain_flash(inputs, 1)
    torch.testing.assert_close(output, expected[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(log_normalizer, expected[1], rtol=0, atol=5e-6)


def test_every_kind_of_block(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    if not inputs.keys.is_cuda:
        # Lists are sorted alike whatever the block is. Sorting is most of what the interpreter
        # takes, and the tests below do it.
        monkeypatch.setattr(
            exact, "order", lambda found, counts, k, *_: plain_order(found, counts, k)
        )
    assert_right(inputs, RANKS)


@pytest.mark.parametrize("longer", [1, 4])
def test_lists_that_overflow(
    make_inputs: Callable[..., Inputs], monkeypatch: pytest.MonkeyPatch, longer: int
) -> None:
    monkeypatch.setattr(exact, "capacity_for", lambda k: 32)
    monkeypatch.setattr(exact, "LONGER", longer)
    inputs = make_inputs(rows=[10, 100])
    inputs.keys[:] = inputs.keys[:1]  # All keys tie, so that all reach any bound.
    assert_right(inputs, RANKS)


def test_a_second_try_with_a_tighter_bound(
    make_inputs: Callable[..., Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "capacity_for", lambda k: 32)
    monkeypatch.setattr(exact, "bound", _first_too_loose(exact.bound))
    monkeypatch.setattr(exact, "_repair", lambda *_: pytest.fail("all lists hold their keys"))
    assert_right(make_inputs(group=1, rows=[10, 60, 119]), RANKS)


def _first_too_loose(bound: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A bound that lets everything through the first time, as where keys of a group are alike."""
    asked: list[int] = []

    def loose(values: Tensor, k: int) -> Tensor:
        asked.append(k)
        right = bound(values, k)
        return torch.full_like(right, -1e30) if len(asked) == 1 else right

    return loose


def test_lists_that_are_too_short(
    make_inputs: Callable[..., Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(group=1, rows=[3, 140])
    monkeypatch.setattr(exact, "bound", lambda maxima, k: maxima.amax(-1) + 1)
    assert_right(inputs, RANKS)


def test_more_ranks_than_keys(make_inputs: Callable[..., Inputs]) -> None:
    assert_right(make_inputs(group=1, rows=[0, 40]), 50)


def test_selection_from_scores(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 400, generator=generator).mul(50).round().to(device)
    scores[1, 2:] = -torch.inf
    scores[2] = 0.0
    ids, right = selection.select(scores, RANKS)
    assert right.tolist() == [True, True, False, True]
    assert torch.equal(ids[right], by_sorting(scores[right], RANKS))
