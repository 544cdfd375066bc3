"""A method whose answer depends on what comes after the query is caught."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
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


MIXERS = """
@dataclass(frozen=True, kw_only=True)
class ByKeys(ScoreMethod):
    def build(self, past):
        return past.keys

    def scores(self, state, queries, positions):
        return self.changed(queries, positions) @ state[: int(positions[-1]) + 1].T


class Mean(ByKeys):
    def changed(self, queries, positions):
        return queries.mean(dim=1, keepdim=True).expand_as(queries)


class Cumulative(ByKeys):
    def changed(self, queries, positions):
        return queries.cummax(dim=1).values


class Sorted(ByKeys):
    def changed(self, queries, positions):
        return queries.gather(1, queries.norm(dim=-1).argsort(dim=1)[..., None].expand_as(queries))


class Normalised(ByKeys):
    def changed(self, queries, positions):
        centred = queries - queries.mean(dim=1, keepdim=True)
        return centred / (1 + centred.norm(dim=1, keepdim=True))


class Somewhat(ByKeys):
    def changed(self, queries, positions):
        return queries - 0.02 * queries.mean(dim=1, keepdim=True)


class OnlyInBlocks(ByKeys):
    def changed(self, queries, positions):
        return queries if len(positions) == 1 else queries.flip(1)


class EndOfBlock(ByKeys):
    def scores(self, state, queries, positions):
        keys = state[: int(positions[-1]) + 1]
        return queries @ (keys * keys[-1]).T


class FromEnd(ByKeys):
    def scores(self, state, queries, positions):
        end = int(positions[-1])
        ids = torch.arange(end + 1)
        return -((end - ids - 9).abs().float()).expand(*queries.shape[:2], -1)


class SearchMean(SearchMethod):
    def build(self, past):
        return past.keys

    def extend(self, state, new):
        return torch.cat([state, new.keys])

    def search(self, state, queries, k):
        pooled = queries.mean(dim=1, keepdim=True).expand_as(queries)
        return (pooled @ state.T).topk(min(k, len(state)), dim=-1).indices


class AttendMean(AttendMethod):
    def attend(self, state, queries, positions, k):
        ids = positions[:, None].expand(len(queries), -1, 1)
        output = state.values[positions].expand(len(queries), -1, -1)
        return output + queries.mean(dim=1, keepdim=True), ids


def pooled(query, key, value, attention_mask, head_mask):
    scores = query.mean(dim=2, keepdim=True) @ key.transpose(-1, -2) + attention_mask
    ids = scores.topk(1, dim=-1).indices
    return value.gather(2, ids.expand(-1, -1, -1, value.shape[-1])), None, ids
"""


@pytest.mark.parametrize(
    ("cheat", "message"),
    [
        ("Mean", "mixes queries"),
        ("Mean:pool=layer-sum", "mixes queries"),
        ("Cumulative", "mixes queries"),
        ("Sorted", "mixes queries"),
        ("Normalised", "mixes queries"),
        ("Somewhat", "mixes queries"),
        ("OnlyInBlocks", "mixes queries"),
        ("EndOfBlock", "(sees the future|differently alone)"),
        ("FromEnd", "differently alone and in a block"),
        ("SearchMean", "mixes queries"),
        ("AttendMean", "mixes queries"),
        ("pooled", "mixes queries"),
    ],
)
def test_queries_of_a_block_are_answered_apart(
    make_trace: MakeTrace, rules: Any, write_methods: Any, cheat: str, message: str
) -> None:
    trace = make_trace([rules(), rules()], [64, 40])
    name = cheat.partition(":")[0]
    with pytest.raises(RetraceError, match=rf"mine\.py:{name}(?=.*{message})(?=.*layer 0, head)"):
        analyze(
            trace, [f"{write_methods(MIXERS)}:{cheat}"], [2, 16], keep_exact=False, min_context=20
        )


MEMORIES = """
SEEN = []
FIRST = {}


@dataclass(frozen=True, kw_only=True)
class ByKeys(ScoreMethod):
    def scores(self, state, queries, positions):
        return self.changed(state, queries) @ state.keys.T


class RunningMean(ByKeys):
    def changed(self, state, queries):
        SEEN.append(queries.mean(dim=(0, 1)))
        return queries + torch.stack(SEEN).mean(dim=0)


class FirstAsked(ByKeys):
    def changed(self, state, queries):
        FIRST.setdefault("query", queries[:, :1].clone())
        return queries + FIRST["query"]


class OnSelf(ByKeys):
    def changed(self, state, queries):
        if "first" not in self.__dict__:
            self.__dict__["first"] = queries[:, :1].clone()
        return queries + self.__dict__["first"]


class OneBuild(ByKeys):
    def build(self, past):
        return FIRST.setdefault((past.group.layer, past.group.kv_head), past)

    def changed(self, state, queries):
        return queries


class InState(ByKeys):
    def build(self, past):
        return {"past": past, "sum": torch.zeros(())}

    def scores(self, state, queries, positions):
        state["sum"] = state["sum"] + queries.sum()
        return (queries + state["sum"]) @ state["past"].keys.T


@dataclass(frozen=True, kw_only=True)
class OneBuffer(AttendMethod):
    def attend(self, state, queries, positions, k):
        ids = positions[:, None].expand(len(queries), -1, 1)
        shape = (len(queries), 99, state.values.shape[1])
        output = FIRST.setdefault(shape, torch.zeros(shape))[:, : len(positions)]
        output += queries
        return output, ids
"""


@pytest.mark.parametrize(
    "cheat", ["RunningMean", "FirstAsked", "OnSelf", "OneBuild", "InState", "OneBuffer"]
)
def test_nothing_is_kept_between_calls(
    make_trace: MakeTrace, rules: Any, write_methods: Any, cheat: str
) -> None:
    trace = make_trace([rules(), rules()], [64, 40])
    with pytest.raises(
        RetraceError, match=rf"mine\.py:{cheat} (keeps something|answered .* when asked twice)"
    ):
        analyze(trace, [f"{write_methods(MEMORIES)}:{cheat}"], [2], keep_exact=False)


def test_a_tensor_may_be_used_again(make_trace: MakeTrace, rules: Any, write_methods: Any) -> None:
    """What a method answers is taken before it is asked again."""
    body = """
    BUFFER = torch.zeros(9, 99, 8)

    @dataclass(frozen=True, kw_only=True)
    class Fresh(AttendMethod):
        def attend(self, state, queries, positions, k):
            ids = positions[:, None].expand(len(queries), -1, 1)
            return state.values[positions].expand(len(queries), -1, -1), ids

    class Reused(Fresh):
        def attend(self, state, queries, positions, k):
            output, ids = super().attend(state, queries, positions, k)
            buffer = BUFFER[: len(queries), : len(positions)]
            buffer.copy_(output)
            return buffer, ids
    """
    file = write_methods(body)
    trace = make_trace(rules(), [64, 40])
    rows = analyze(trace, [f"{file}:Fresh", f"{file}:Reused"], [2, 3], keep_exact=False).metrics
    fresh, reused = (
        rows[rows["method"] == f"mine.py:{name}"].drop(columns="method").reset_index(drop=True)
        for name in ("Fresh", "Reused")
    )
    pd.testing.assert_frame_equal(fresh, reused)


def test_rounding_is_no_leak(make_trace: MakeTrace, rules: Any, write_methods: Any) -> None:
    """Keys that are equal, and sums whose order depends on the block."""
    body = """
    @dataclass(frozen=True, kw_only=True)
    class Rounds(SearchMethod):
        def build(self, past):
            return past.keys

        def extend(self, state, new):
            return torch.cat([state, new.keys])

        def search(self, state, queries, k):
            order = torch.arange(state.shape[1]).roll(queries.shape[1])
            scores = (queries[..., order, None] * state.T[order]).float().cumsum(dim=2)[:, :, -1]
            return scores.topk(min(k, len(state)), dim=-1).indices
    """
    rng = np.random.default_rng(0)
    layer = rules()
    query, value = (rng.normal(size=(2, 200, 8)) for _ in range(2))
    key = rng.normal(size=(2, 20, 8)).repeat(10, axis=1)
    trace = make_trace(layer, [200], tensors={(0, 0): (query, key, value)}, name="equal")
    spec = f"{write_methods(body)}:Rounds"
    assert len(analyze(trace, [spec], [2], keep_exact=False).metrics)


def test_every_kind_of_layer_is_tried(
    make_trace: MakeTrace, rules: Any, write_methods: Any
) -> None:
    body = """
    @dataclass(frozen=True, kw_only=True)
    class Windowed(ScoreMethod):
        def build(self, past):
            return past if past.group.rules.window is None else past.keys.mean(dim=0) * past.keys

        def scores(self, state, queries, positions):
            return queries @ (state if isinstance(state, torch.Tensor) else state.keys).T
    """
    trace = make_trace([rules(), rules(window=13), rules()])
    with pytest.raises(RetraceError, match=r"Windowed sees the future.*layer 1,"):
        analyze(trace, [f"{write_methods(body)}:Windowed"], [2], keep_exact=False)


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
