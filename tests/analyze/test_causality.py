"""A method whose answer depends on what comes after the query is caught."""

from collections.abc import Callable
from typing import Any

import pytest

from retrace.analyze import analyze
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]


CHEATS = """
@dataclass(frozen=True, kw_only=True)
class MeanOfAll(ScoreMethod):
    def build(self, past):
        return past.keys * past.keys.mean(dim=0)

    def scores(self, state, queries, positions):
        return queries @ state.T


@dataclass(frozen=True, kw_only=True)
class LengthOfAll(ScoreMethod):
    def build(self, past):
        return past.keys, past.keys[-1]

    def scores(self, state, queries, positions):
        keys, last = state
        return (queries - last) @ keys.T


@dataclass(frozen=True, kw_only=True)
class OutputOfAll(AttendMethod):
    def build(self, past):
        return past.values.mean(dim=0)

    def attend(self, state, queries, positions, k):
        ids = positions[:, None].expand(len(queries), -1, 1)
        return state.expand(*queries.shape[:2], -1), ids


@dataclass(frozen=True, kw_only=True)
class QueriesOfAll(ScoreMethod):
    def scores(self, state, queries, positions):
        return (queries * state.queries.mean(dim=(0, 1))) @ state.keys.T


@dataclass(frozen=True, kw_only=True)
class NeighboursOfAll(ScoreMethod):
    def scores(self, state, queries, positions):
        return (queries * state.heads[1].keys.mean(dim=0)) @ state.keys.T


@dataclass(frozen=True, kw_only=True)
class OtherLayerOfAll(ScoreMethod):
    def scores(self, state, queries, positions):
        return (queries * state.layer(1)[0].queries.sum(dim=1)[:1]) @ state.keys.T


@dataclass(frozen=True, kw_only=True)
class Changeable(ScoreMethod):
    def scores(self, state, queries, positions):
        return torch.rand(*queries.shape[:2], state.end)
"""


@pytest.mark.parametrize(
    "cheat",
    [
        "MeanOfAll",
        "LengthOfAll",
        "OutputOfAll",
        "QueriesOfAll",
        "NeighboursOfAll",
        "OtherLayerOfAll",
    ],
)
@pytest.mark.parametrize("protocol", ["all", "prefix:20"])
def test_cheats_are_caught(
    make_trace: MakeTrace, rules: Any, write_methods: Any, cheat: str, protocol: str
) -> None:
    trace = make_trace([rules(), rules()])
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

    def build(self, past):
        return past.keys.mean(dim=0), past.end, past.keys

    def extend(self, state, new):
        mean, count, held = state
        return mean, count, torch.cat([held, new.keys])

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
