"""Keys at random."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import analyze
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Block, load_units
from retrace.traces import Trace

MakeTrace = Callable[..., Trace]


def selections(trace: Trace, k: int, rows: int, spec: str = "random") -> torch.Tensor:
    """What `random` selects for the first kv head (group, queries, k), in blocks of `rows`."""
    unit = next(load_units(trace.layer(0), 0, torch.device("cpu")))
    method = parse_spec(spec).method
    states = States(method, unit, Protocol())
    count = len(unit.positions)
    ids = []
    for start in range(0, count, rows):
        block = Block(unit, slice(start, min(start + rows, count)))
        (served,) = states.serve(block)
        (selection,) = select(method, served, block, [k])
        short = k - selection.ids.shape[-1]
        ids.append(torch.nn.functional.pad(selection.ids, (0, short), value=-1))
    return torch.cat(ids, dim=1)


def test_recall_is_k_over_n_on_average(make_trace: MakeTrace, rules: Any) -> None:
    queries = [range(200, 240)] * 6
    trace = make_trace(rules(heads=4), [240] * 6, queries=queries)
    rows = analyze(trace, ["random"], [10, 20], min_context=0, keep_exact=False).metrics
    rows = rows[rows.metric == "recall"]
    for k in (10, 20):
        mine = rows[rows.topk == k]
        wanted = np.mean([k / (i + 1) for i in range(200, 240)])
        error = np.sqrt((mine["std"] ** 2).mean() / mine["count"].sum())
        assert mine["mean"].mean() == pytest.approx(wanted, abs=4 * error)


def test_every_key_is_as_likely(make_trace: MakeTrace, rules: Any) -> None:
    layer = rules(heads=4, kv_heads=1, window=20)
    trace = make_trace(layer, [1020])
    ids = selections(trace, 5, 100)[:, 20:]
    age = torch.arange(20, 1020)[:, None] - ids
    counts = torch.bincount(age.flatten(), minlength=20).double()
    assert counts.sum() == 5 * 4 * 1000
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 50.8  # 19 degrees of freedom, 1 in 10,000


def test_answer_is_the_same_in_any_block(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(heads=4), [60])
    whole = selections(trace, 4, 60)
    for rows in (1, 7, 59):
        assert torch.equal(selections(trace, 4, rows), whole)


def test_heads_queries_and_seeds_differ(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(heads=4), [60])
    ids = selections(trace, 4, 60)
    assert not torch.equal(ids[0], ids[1])
    assert not torch.equal(ids, selections(trace, 4, 60, "random:seed=1"))
    assert len({tuple(row) for row in ids[0, 30:].tolist()}) == 30


def test_small_budgets_are_part_of_large_ones(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), [60])
    assert torch.equal(selections(trace, 4, 60), selections(trace, 9, 60)[..., :4])
