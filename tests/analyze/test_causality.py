"""No method's answer depends on what comes after the query."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from retrace.analyze import analyze, method_names, parse_spec
from retrace.analyze.select import select
from retrace.analyze.states import Protocol, States
from retrace.analyze.unit import Block, Unit, load_units
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]


@pytest.fixture(params=method_names())
def method(request: pytest.FixtureRequest) -> str:
    """Every installed method whose dependencies are there."""
    if request.param == "hnsw":
        pytest.importorskip("faiss", reason="faiss is not installed")
    return str(request.param)


@pytest.mark.parametrize("protocol", ["all", "all:16", "prefix:20", "prefix:0.4"])
def test_changed_future(
    make_trace: MakeTrace, rules: Any, tensors: Any, method: str, protocol: str
) -> None:
    """Figures of the queries up to a position, with two futures after it."""
    layer = rules(heads=4)
    query, key, value = tensors(layer, 64, np.random.default_rng(4))
    for last in (25, 46):
        frames = []
        for name in ("one", "other"):
            future = np.random.default_rng(len(name)).normal(size=key.shape) * 5
            after = np.arange(64)[:, None] > last
            changed = (query, np.where(after, future, key), np.where(after, -future, value))
            trace = make_trace(
                layer,
                [64],
                queries=[range(last + 1)],
                tensors={(0, 0): changed},
                name=f"{name}-{last}",
            )
            frames.append(
                analyze(trace, [method], [2, 5], protocol=protocol, min_context=0, keep_exact=False)
            )
        pd.testing.assert_frame_equal(frames[0].metrics, frames[1].metrics, check_exact=True)
        pd.testing.assert_frame_equal(frames[0].curves, frames[1].curves, check_exact=True)


@pytest.mark.parametrize("protocol", ["all:16", "prefix:20"])
def test_keys_that_come_later_change_no_selection(
    make_trace: MakeTrace, rules: Any, method: str, protocol: str
) -> None:
    """Selections of early queries, with and without the rest of the sequence."""
    trace = make_trace(rules(heads=4), [64])
    whole = next(load_units(trace.layer(0), 0, torch.device("cpu")))
    early = replace(
        whole,
        queries=whole.queries[:, :40],
        positions=whole.positions[:40],
        keys=whole.keys[:40],
        values=whole.values[:40],
    )

    def selections(unit: Unit) -> list[Any]:
        found = []
        spec, states = parse_spec(method), Protocol.parse(protocol)
        state_of = States(spec.method, unit, states)
        for row in range(20, 40):
            block = Block(unit, slice(row, row + 1))
            for rows, state, indexed in state_of.serve(block):
                for s in select(spec.method, state, indexed, block.part(rows), [3]):
                    count = s.attended.expand(1, 2, 1)
                    found += [
                        s.ids[head, 0, : int(count[0, head, 0])].tolist() for head in range(2)
                    ]
        return found

    assert selections(whole) == selections(early)


CHEATS = """
@dataclass(frozen=True, kw_only=True)
class MeanOfAll(ScoreMethod):
    def build(self, keys, values, group):
        return keys * keys.mean(dim=0)

    def scores(self, state, queries, positions):
        return queries @ state.T


@dataclass(frozen=True, kw_only=True)
class LengthOfAll(ScoreMethod):
    def build(self, keys, values, group):
        return keys, keys[-1]

    def scores(self, state, queries, positions):
        keys, last = state
        return (queries - last) @ keys.T


@dataclass(frozen=True, kw_only=True)
class OutputOfAll(AttendMethod):
    def build(self, keys, values, group):
        return values.mean(dim=0)

    def attend(self, state, queries, positions, k):
        ids = positions[:, None].expand(len(queries), -1, 1)
        return state.expand(*queries.shape[:2], -1), ids


@dataclass(frozen=True, kw_only=True)
class Changeable(ScoreMethod):
    def scores(self, state, queries, positions):
        return torch.rand(*queries.shape[:2], len(state))
"""


@pytest.mark.parametrize("cheat", ["MeanOfAll", "LengthOfAll", "OutputOfAll"])
@pytest.mark.parametrize("protocol", ["all", "prefix:20"])
def test_cheats_are_caught(
    make_trace: MakeTrace, rules: Any, write_methods: Any, cheat: str, protocol: str
) -> None:
    trace = make_trace(rules())
    with pytest.raises(
        RetraceError,
        match=rf"mine\.py:{cheat} sees the future.*layer 0, head 0, sequence 0, position \d+",
    ):
        analyze(trace, [f"{write_methods(CHEATS)}:{cheat}"], [2], protocol=protocol)


def test_random_answers_are_caught(make_trace: MakeTrace, rules: Any, write_methods: Any) -> None:
    with pytest.raises(RetraceError, match=r"Changeable answered .* differently when asked twice"):
        analyze(make_trace(rules()), [f"{write_methods(CHEATS)}:Changeable"], [2])


FITTED = """
@dataclass(frozen=True, kw_only=True)
class MeanSoFar(ScoreMethod):
    fitted = True

    def build(self, keys, values, group):
        return keys.mean(dim=0), len(keys), keys

    def extend(self, state, keys, values, group):
        mean, count, held = state
        return mean, count, torch.cat([held, keys])

    def scores(self, state, queries, positions):
        mean, count, keys = state
        assert count <= int(positions[0])
        return (queries * mean) @ keys.T
"""


@pytest.mark.parametrize("protocol", ["all", "all:16", "prefix:20", "prefix:0.5"])
def test_fitted_state_is_of_earlier_keys(
    make_trace: MakeTrace, rules: Any, write_methods: Any, protocol: str
) -> None:
    spec = f"{write_methods(FITTED)}:MeanSoFar"
    rows = analyze(make_trace(rules()), [spec], [2], protocol=protocol, min_context=0).metrics
    assert rows["count"].min() > 0
