"""Moments of all metrics by the compiled walk over each list, against plain operations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose

from retrace.analyze.exact.reference import exact_pass
from retrace.analyze.metrics.histogram import RESOLUTION
from retrace.analyze.metrics.measure import ExactBlock, Tallied, plain_tally
from retrace.analyze.metrics.tails import EveryQuery, tails_of
from retrace.analyze.metrics.tally import tally
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block, HeadGroup, Unit
from retrace.traces import LayerRules

KS = (1, 2, 5, 9, 30)
BUCKETS = torch.stack([torch.arange(21) // 5, torch.arange(21) % 3 * 2])


def a_block(**changes: Any) -> tuple[Block, torch.Generator]:
    """The last queries of a unit of 3 heads and 41 keys."""
    generator = torch.Generator().manual_seed(5)
    rules = replace(LayerRules("random", 3, 1, 4, 7, 0.5), **changes)
    unit = Unit(
        HeadGroup(0, 0, 0, rules),
        torch.randn(3, 41, 4, generator=generator),
        torch.arange(41),
        torch.randn(41, 4, generator=generator) * 3,
        torch.randn(41, 7, generator=generator),
        None if rules.sinks is None else torch.tensor(rules.sinks),
    )
    return Block(unit, slice(20, 41)), generator


def select_any(block: Block, generator: torch.Generator, **options: Any) -> Selection:
    """Visible keys in any order, shorter lists for some queries."""
    order = torch.rand(3, 21, block.end, generator=generator).argsort(dim=-1)[..., :30]
    ids = order.masked_fill(~block.visible.expand(3, -1, -1).gather(-1, order), -1)
    ids = ids.gather(-1, (ids < 0).to(torch.uint8).argsort(dim=-1, stable=True))
    attended = torch.tensor(KS)[:, None, None].expand(-1, 3, 21)
    return Selection(KS, ids, attended, **options)


def both(
    exact: ExactBlock, selection: Selection, points: list[int], first: tuple[int, ...] | None = None
) -> dict[str, list[Any]]:
    """Moments by metric, compiled and plain, which must be alike."""
    start = torch.tensor(first or [0] * len(selection.ks))
    return alike(*(f(exact, selection, points, start) for f in (tally, plain_tally)))


def alike(*pair: Tallied) -> dict[str, list[Any]]:
    """Two tallies, metric by metric, which must be alike."""
    told = [one.tails for one in pair if isinstance(one.tails, EveryQuery)]
    assert_allclose(*(one.figures for one in told), rtol=2e-5, atol=4e-6)
    medians = [tails_of([one]).medians("error_norm") for one in told]
    assert_allclose(*medians, rtol=2.1 * RESOLUTION, atol=4e-6)
    found: dict[str, list[Any]] = {}
    for ours, theirs in zip(*(one[:3] for one in pair), strict=True):
        assert ours.keys() == theirs.keys()
        for metric, moments in ours.items():
            found[metric] = [moments, theirs[metric]]
            for part in ("count", "mean", "squares"):
                one, other = (getattr(m, part) for m in found[metric])
                assert_allclose(one, other, rtol=2e-5, atol=4e-6, err_msg=f"{metric} {part}")
    return found


@pytest.mark.parametrize("output", ["renorm", "true-denominator", "mean-fill", "own"])
@pytest.mark.parametrize(
    "changes", [{}, {"window": 9}, {"softcap": 2.0}, {"sinks": (1.0, -2.0, 9.0)}], ids=str
)
def test_as_by_plain_operations(changes: dict[str, Any], output: str) -> None:
    block, generator = a_block(**changes)
    exact = ExactBlock(block, exact_pass(block, 30), BUCKETS)
    selection = select_any(block, generator)
    if output == "true-denominator":
        selection = replace(selection, true_denominator=True)
    if output == "mean-fill":
        estimates = torch.rand(3, 21, 30, generator=generator) / 30
        estimates.masked_fill_(selection.ids < 0, 0.0)
        selection = replace(selection, estimates=estimates)
    if output == "own":
        selection = replace(selection, output=torch.randn(len(KS), 3, 21, 7, generator=generator))
    found = both(exact, selection, [0, 2, 4], (0, 20, 25, 33, 40))
    # The same where the pass that gave the answers is long over, and for some of the queries.
    later = ExactBlock(Block(block.unit, block.rows), exact.reference, BUCKETS)
    again = both(later, selection, [0, 2, 4], (0, 20, 25, 33, 40))
    for metric, (moments, _) in found.items():
        assert_allclose(again[metric][0].mean, moments.mean, rtol=2e-5, atol=4e-6)
    assert found["recall"][0].count.T.tolist() == [[21, 21, 16, 8, 1]] * 3
    assert found["error_norm"][0].count.T.tolist() == [[21, 16, 1]] * 3
    assert (found["error_norm"][0].mean > 0).all()


@pytest.mark.parametrize("alike", [True, False], ids=["one window", "a window each"])
def test_what_is_given_and_what_comes_besides(alike: bool) -> None:
    block, generator = a_block()
    exact = ExactBlock(block, exact_pass(block, 30), BUCKETS)
    selection = select_any(block, generator)
    more = torch.randint(0, 9, (5, 3, 21), generator=generator).cumsum(0)
    selection = replace(
        selection,
        attended=more,
        sink=3,
        first_given=block.positions - torch.tensor([[6]] if alike else [[2], [2], [4], [9], [20]]),
        extra_keys=torch.randint(0, 4, (21,), generator=generator),
        aux_bytes=torch.rand(21, generator=generator),
        attended_bytes=5.0,
    )
    found = both(exact, selection, [1, 3])
    assert (found["candidate_recall"][0].mean != found["recall"][0].mean).any()
    everything = replace(selection, first_given=torch.zeros_like(block.positions)[None])
    assert not both(exact, everything, [1, 3])["candidate_recall"][0].count.any()


def test_nothing_attended_is_an_output_of_zeros() -> None:
    block, generator = a_block()
    exact = ExactBlock(block, exact_pass(block, 30), BUCKETS)
    selection = replace(
        select_any(block, generator), ids=torch.full((3, 21, 30), -1, dtype=torch.int64)
    )
    assert_allclose(both(exact, selection, [0, 4])["error_norm"][0].mean, 1.0)


def test_tiny_probabilities_do_not_vanish() -> None:
    block, generator = a_block()
    block = Block(replace(block.unit, keys=block.unit.keys * 20), block.rows)
    exact = ExactBlock(block, exact_pass(block, 30), BUCKETS)
    found = both(exact, select_any(block, generator), [0, 4])
    assert (found["error_norm"][0].count == 21).all()
