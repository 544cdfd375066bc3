"""Moments of all metrics by kernels, against plain operations: on a GPU where there is one, else in
Triton's interpreter, of few queries."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose

from retrace.analyze.exact.reference import exact_pass
from retrace.analyze.metrics.histogram import RESOLUTION
from retrace.analyze.metrics.measure import ExactBlock, plain_tally
from retrace.analyze.metrics.tails import EveryQuery, Tails, tails_of
from retrace.analyze.units.selection import Selection, missing_last
from retrace.analyze.units.unit import Block, HeadGroup, Unit
from retrace.traces import LayerRules, RetraceError

pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")

from retrace.analyze.metrics.kernels.tally import tally

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KS = (1, 2, 5, 9, 40)
LENGTH, QUERIES, GROUP, LISTED = 90, 4, 2, 40
BUCKETS = torch.stack([torch.arange(QUERIES) // 2, torch.arange(QUERIES) % 3])


def make_exact(scale: float = 1.0, group: int = GROUP, **changes: Any) -> ExactBlock:
    """The last queries of a unit, against its keys."""
    generator = torch.Generator().manual_seed(5)
    rules = replace(LayerRules("random", group, 1, 4, 7, 0.5), **changes)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    unit = Unit(
        HeadGroup(0, 0, 0, rules),
        random(group, LENGTH, 4),
        torch.arange(LENGTH, device=DEVICE),
        random(LENGTH, 4) * 3 * scale,
        random(LENGTH, 7),
        None if rules.sinks is None else torch.tensor(rules.sinks, device=DEVICE),
    )
    block = Block(unit, slice(LENGTH - QUERIES, LENGTH))
    return ExactBlock(block, exact_pass(block, max(KS)), BUCKETS)


def select_any(exact: ExactBlock, **options: Any) -> Selection:
    """Visible keys in any order, shorter lists for some queries."""
    block, generator = exact.block, torch.Generator().manual_seed(7)
    group = len(block.queries)
    order = torch.rand(group, QUERIES, block.end, generator=generator).argsort(dim=-1)
    order = order[..., :LISTED].to(DEVICE)
    seen = block.visible.expand(group, -1, -1).gather(-1, order)
    attended = torch.tensor(KS, device=DEVICE)[:, None, None]
    return Selection(KS, missing_last(order.masked_fill(~seen, -1)), attended, **options)


def assert_alike(
    exact: ExactBlock, selection: Selection, points: list[int], first: tuple[int, ...] = (0,) * 5
) -> None:
    start = torch.tensor(first)
    ours, theirs = (way(exact, selection, points, start) for way in (tally, plain_tally))
    assert isinstance(ours.tails, Tails) and isinstance(theirs.tails, EveryQuery)
    tails = ours.tails, tails_of([theirs.tails])
    assert_allclose(*(one.medians("error_norm") for one in tails), rtol=2.1 * RESOLUTION, atol=4e-6)
    assert_allclose(*(one.counts() for one in tails))
    assert_allclose(*(one.worst.figure for one in tails), rtol=2e-5, atol=4e-6)
    for found, wanted in zip(ours[:3], theirs[:3], strict=True):
        assert found.keys() == wanted.keys()
        for metric in found:
            for part in ("count", "mean", "squares"):
                one, other = (getattr(of[metric], part) for of in (found, wanted))
                assert_allclose(one, other, rtol=2e-5, atol=4e-6, err_msg=f"{metric} {part}")


def test_budgets_that_count_for_fewer_queries_each() -> None:
    exact = make_exact()
    assert_alike(exact, select_any(exact), [0, 2, 4], (0, 87, 88, 88, 89))


@pytest.mark.parametrize(
    "changes", [{"window": 9}, {"softcap": 2.0}, {"sinks": (1.0, -2.0)}], ids=str
)
@pytest.mark.parametrize("true_denominator", [False, True])
def test_rules_of_the_layer(changes: dict[str, Any], true_denominator: bool) -> None:
    exact = make_exact(**changes)
    assert_alike(exact, select_any(exact, true_denominator=true_denominator), [4])


def test_mean_fill() -> None:
    exact = make_exact()
    selection = select_any(exact)
    estimates = torch.rand(selection.ids.shape, device=DEVICE) / LISTED
    assert_alike(exact, replace(selection, estimates=estimates), [1, 4])


def test_an_output_of_its_own() -> None:
    exact = make_exact()
    output = torch.randn(len(KS), GROUP, QUERIES, 7, device=DEVICE)
    assert_alike(exact, select_any(exact, output=output), [1, 4])


def test_ranks_that_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrace.analyze.metrics.kernels.walk.COMPARED", 0)
    exact = make_exact(window=30)  # fewer keys than ranks
    assert (exact.reference.ids < 0).any()
    assert_alike(exact, select_any(exact), [0, 4])
    part = exact.rows(slice(1, QUERIES))
    assert torch.equal(part.rank_table, exact.rank_table[:, 1:])
    own = part.selection(KS)
    assert_alike(part, own, [1, 3])
    looked_up = part.rank_table.gather(-1, own.ids.clamp(min=0))
    assert torch.equal(looked_up[own.ids >= 0].long(), part.ranks(own.ids)[own.ids >= 0])


@pytest.mark.parametrize("alike", [True, False], ids=["one window", "a window each"])
def test_what_is_given_and_what_comes_besides(alike: bool) -> None:
    exact = make_exact()
    generator = torch.Generator().manual_seed(1)
    most = torch.randint(0, 9, (5, GROUP, QUERIES), generator=generator).cumsum(0).to(DEVICE)
    recent = [[6]] if alike else [[2], [2], [4], [9], [50]]
    selection = select_any(
        exact,
        sink=3,
        first_given=exact.block.positions - torch.tensor(recent, device=DEVICE),
        extra_keys=torch.randint(0, 4, (QUERIES,), generator=generator).to(DEVICE),
        aux_bytes=torch.rand(QUERIES, generator=generator).to(DEVICE),
        attended_bytes=5.0,
    )
    assert_alike(exact, replace(selection, attended=most), [1, 3])


def test_one_head_and_one_list_for_all_heads() -> None:
    alone = make_exact(group=1)
    assert_alike(alone, select_any(alone), [1, 4])
    exact = make_exact()
    shared = select_any(exact).ids[:1].expand(GROUP, -1, -1)
    assert_alike(exact, replace(select_any(exact), ids=shared), [1, 4])


def test_nothing_attended() -> None:
    exact = make_exact()
    nothing = torch.full((GROUP, QUERIES, LISTED), -1, device=DEVICE)
    assert_alike(exact, replace(select_any(exact), ids=nothing), [0, 4])


def test_tiny_probabilities_do_not_vanish() -> None:
    exact = make_exact(scale=20.0)
    assert_alike(exact, select_any(exact), [0, 4])


def test_a_figure_that_cannot_be() -> None:
    exact = make_exact()
    wrong = replace(exact.reference, log_normalizer=exact.reference.log_normalizer - 1)
    spoilt = ExactBlock(exact.block, wrong, exact.buckets)
    with pytest.raises(RetraceError, match=r"cannot be, (exact )?attention fraction of"):
        tally(spoilt, spoilt.selection(KS), [4], torch.zeros(5, dtype=torch.int64))
