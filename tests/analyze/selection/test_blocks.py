"""How queries are cut into blocks changes nothing."""

import importlib.util
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze.exact.reference import Reference, exact_pass
from retrace.analyze.exact.store import ReferenceStore
from retrace.analyze.methods.base import BlockMethod
from retrace.analyze.methods.registry import method_names
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.replay.calibration import calibration
from retrace.analyze.replay.clock import Clock
from retrace.analyze.replay.counting import Counting
from retrace.analyze.replay.engine import replay
from retrace.analyze.replay.plan import Plan, Replayed
from retrace.analyze.replay.tally import Tally
from retrace.analyze.units.unit import Block, load_units
from retrace.traces import Layer, Rotation, Trace

CPU = torch.device("cpu")
TIES_BY_ROUNDING = ("oracle-value", "low-bit", "pariskv")
"""Two keys move the output alike, or have the same product when rounded to few bits: which of them
comes first is left to how a matrix product of this size is summed."""


def tallies(trace: Trace, protocol: str, block_elements: int | None) -> dict[str, Tally]:
    """Every installed method over the first layer and sequence, but what is of other models or of
    blocks of queries."""
    methods = []
    for name in (name for name in method_names() if name != "native"):
        spec = parse_spec(name)
        if isinstance(spec.method, BlockMethod):
            continue
        extra = type(spec.method).extra
        if extra is None or importlib.util.find_spec(extra):
            given = calibration(trace, spec, (1,), trace.layers, CPU, keep=False)
            methods.append(Replayed(spec, (2, 7), given))
    plan = Plan(tuple(methods), Counting.asked(protocol, 0), block_elements)
    found = replay(trace, 0, 0, plan, CPU, ReferenceStore(None), Clock(CPU))
    return {str(m.spec): t for m, t in zip(methods, found, strict=True)}


def test_exact_answers_of_a_whole_unit_at_once(
    make_trace: Callable[..., Trace], rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU has them: blocks then take their part."""
    trace = make_trace([rules(heads=4, window=9)], [50])
    plan = Plan((Replayed(parse_spec("quest"), (2, 7)),), Counting.asked("all", 11), 300)
    arguments = (plan, CPU, ReferenceStore(None), Clock(CPU))
    [by_blocks] = replay(trace, 0, 0, *arguments)
    monkeypatch.setattr("retrace.analyze.replay.engine.holds_no_scores", lambda block, ranks: True)
    [at_once] = replay(trace, 0, 0, *arguments)
    for metric in by_blocks.at_points:
        for moment in ("count", "mean", "squares"):
            theirs = getattr(by_blocks.at_points[metric], moment)
            ours = getattr(at_once.at_points[metric], moment)
            np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=metric)


def test_scores_of_one_block_at_a_time(
    make_trace: Callable[..., Trace], rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded by a block of queries, however many there are."""
    plan = Plan((Replayed(parse_spec("quest"), (2,)),), Counting.asked("all", 0), 300)
    seen: list[weakref.ref[Block]] = []

    def counted(block: Block, ranks: int) -> Reference:
        assert sum(other() is not None for other in seen) <= 1  # the one before, at most
        seen.append(weakref.ref(block))
        return exact_pass(block, ranks)

    monkeypatch.setattr("retrace.analyze.replay.engine.exact_pass", counted)
    trace = make_trace([rules(heads=4)], [50])
    replay(trace, 0, 0, plan, CPU, ReferenceStore(None), Clock(CPU))
    assert len(seen) > 5


@pytest.mark.parametrize("heads_at_once", [1, 2, 3])
def test_heads_read_one_by_one_or_together(
    make_trace: Callable[..., Trace],
    rules: Any,
    monkeypatch: pytest.MonkeyPatch,
    heads_at_once: int,
) -> None:
    trace = make_trace([rules(heads=6, kv_heads=3, value_dim=5)], [50])
    whole = list(load_units(trace.layer(0), 0, CPU))
    of_a_head = 4 * sum(t.numel() for t in (whole[0].queries, whole[0].keys, whole[0].values))
    monkeypatch.setattr("retrace.analyze.units.unit.READ_BYTES", heads_at_once * of_a_head)
    reads = []
    key = Layer.key
    monkeypatch.setattr(Layer, "key", lambda *at: reads.append(at[-1]) or key(*at))
    for ours, theirs in zip(load_units(trace.layer(0), 0, CPU), whole, strict=True):
        assert ours.group == theirs.group
        for name in ("queries", "keys", "values"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert len(reads) == -(-3 // heads_at_once)


@pytest.mark.parametrize(
    ("changes", "protocol", "block_elements"),
    [({"heads": 4}, "all:20", 1), ({"window": 9}, "prefix:20", 700), ({"chunk": 16}, "all", 700)],
    ids=str,
)
def test_block_size(
    make_trace: Callable[..., Trace],
    rules: Any,
    changes: dict[str, Any],
    protocol: str,
    block_elements: int,
) -> None:
    layer = rules(rotation=Rotation((1.0, 0.3)), **changes)
    trace = make_trace([layer, layer], [50, 40])
    whole = tallies(trace, protocol, None)
    for method, parts in tallies(trace, protocol, block_elements).items():
        for ours, theirs in (
            (parts.at_all, whole[method].at_all),
            (parts.at_points, whole[method].at_points),
        ):
            assert ours.keys() == theirs.keys()
            for metric in ours:
                if (method, metric) == ("hnsw", "bytes_ratio"):
                    continue  # faiss counts comparisons of a whole block
                moments = ("mean",) if method in TIES_BY_ROUNDING else ("mean", "squares")
                np.testing.assert_array_equal(ours[metric].count, theirs[metric].count)
                for moment in moments:
                    np.testing.assert_allclose(
                        getattr(ours[metric], moment),
                        getattr(theirs[metric], moment),
                        atol=1.1 / 20 if method in TIES_BY_ROUNDING else 2e-5,
                        err_msg=f"{method} {metric} {moment}",
                    )
