"""Error norms by the compiled walk over each list, against outputs in plain operations."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from retrace.analyze.measure import ExactBlock, measure, plain_error_norms
from retrace.analyze.reference import exact_pass
from retrace.analyze.selection import Selection
from retrace.analyze.unit import Block, HeadGroup, Unit
from retrace.traces import LayerRules

KS = (1, 2, 5, 9, 30)


def a_block(**changes: Any) -> tuple[Block, torch.Generator]:
    """The last queries of a unit of 3 heads and 41 keys."""
    generator = torch.Generator().manual_seed(5)
    rules = replace(LayerRules("random", 3, 1, 4, 7, 0.5), **changes)
    unit = Unit(
        HeadGroup(0, 0, 0, rules, 4),
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


@pytest.mark.parametrize("output", ["renorm", "true-denominator", "mean-fill"])
@pytest.mark.parametrize(
    "changes", [{}, {"window": 9}, {"softcap": 2.0}, {"sinks": (1.0, -2.0, 9.0)}], ids=str
)
def test_as_by_plain_operations(changes: dict[str, Any], output: str) -> None:
    block, generator = a_block(**changes)
    exact = ExactBlock(block, exact_pass(block, 30))
    selection = select_any(block, generator)
    if output == "true-denominator":
        selection = replace(selection, true_denominator=True)
    if output == "mean-fill":
        estimates = torch.rand(3, 21, 30, generator=generator) / 30
        estimates.masked_fill_(selection.ids < 0, 0.0)
        selection = replace(selection, estimates=estimates)
    points = [0, 2, 4]
    found = measure(exact, selection, points).at_points["error_norm"]
    plain = plain_error_norms(exact, selection, exact.probabilities(selection.ids), points)
    torch.testing.assert_close(found, plain, rtol=2e-5, atol=2e-6)


def test_nothing_attended_is_an_output_of_zeros() -> None:
    block, generator = a_block()
    exact = ExactBlock(block, exact_pass(block, 30))
    selection = replace(
        select_any(block, generator), ids=torch.full((3, 21, 30), -1, dtype=torch.int64)
    )
    found = measure(exact, selection, [0, 4]).at_points["error_norm"]
    torch.testing.assert_close(found, torch.ones(2, 3, 21))


def test_tiny_probabilities_do_not_vanish() -> None:
    block, generator = a_block()
    block = Block(replace(block.unit, keys=block.unit.keys * 20), block.rows)
    exact = ExactBlock(block, exact_pass(block, 30))
    selection = select_any(block, generator)
    found = measure(exact, selection, [0, 4]).at_points["error_norm"]
    plain = plain_error_norms(exact, selection, exact.probabilities(selection.ids), [0, 4])
    assert found.isfinite().all()
    torch.testing.assert_close(found, plain, rtol=2e-5, atol=2e-6)
