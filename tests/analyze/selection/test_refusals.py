"""Answers that a method must not give are refused, naming where."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import analyze
from retrace.analyze.units.selection import _repeated
from retrace.traces import RetraceError, Trace

BAD = """
@dataclass(frozen=True, kw_only=True)
class ScoresNan(ScoreMethod):
    def scores(self, state, queries, positions):
        scores = queries @ state.keys.T
        scores[..., 3] = torch.nan
        return scores


@dataclass(frozen=True, kw_only=True)
class ScoresShape(ScoreMethod):
    def scores(self, state, queries, positions):
        return torch.zeros(len(queries), len(positions))


@dataclass(frozen=True, kw_only=True)
class SearchFuture(SearchMethod):
    def extend(self, state, new):
        return state

    def search(self, state, queries, k):
        return torch.full((*queries.shape[:2], k), 10**6)


@dataclass(frozen=True, kw_only=True)
class SearchTwice(SearchFuture):
    def search(self, state, queries, k):
        return torch.full((*queries.shape[:2], k), 1)


@dataclass(frozen=True, kw_only=True)
class SearchNegative(SearchFuture):
    def search(self, state, queries, k):
        return torch.full((*queries.shape[:2], k), -7)


@dataclass(frozen=True, kw_only=True)
class SearchShape(SearchFuture):
    def search(self, state, queries, k):
        return torch.zeros(k, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class AttendFuture(AttendMethod):
    ahead = 1

    def build(self, past):
        return past.values

    def attend(self, state, queries, positions, k):
        ids = (positions[:, None] + self.ahead).expand(len(queries), -1, 1)
        return state[positions].expand(len(queries), -1, -1), ids


@dataclass(frozen=True, kw_only=True)
class AttendTwice(AttendFuture):
    def attend(self, state, queries, positions, k):
        ids = positions[:, None].expand(len(queries), -1, 2)
        return state[positions].expand(len(queries), -1, -1), ids


@dataclass(frozen=True, kw_only=True)
class AttendHidden(AttendFuture):
    ahead = -9


@dataclass(frozen=True, kw_only=True)
class AttendNan(AttendFuture):
    ahead = 0

    def attend(self, state, queries, positions, k):
        output, ids = super().attend(state, queries, positions, k)
        return output * torch.nan, ids


@dataclass(frozen=True, kw_only=True)
class AttendShape(AttendFuture):
    ahead = 0

    def attend(self, state, queries, positions, k):
        output, ids = super().attend(state, queries, positions, k)
        return output[..., :1], ids


def future(query, key, value, attention_mask, head_mask):
    ids = torch.full((*query.shape[:3], 1), key.shape[2])
    return query[..., : value.shape[3]], None, ids
"""
PLACE = r"layer 0, head \d+, sequence \d+, position \d+"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("ScoresNan", rf"scores\(\) gave NaN at {PLACE}"),
        (
            "ScoresShape",
            rf"scores\(\) gave shape .* at {PLACE}; expected \(group, queries, units\)",
        ),
        ("SearchFuture", rf"returned a future key, 1000000, at {PLACE}"),
        ("SearchTwice", rf"returned key 1 twice at {PLACE}"),
        ("SearchNegative", rf"returned a key that the query can't see, -7, at {PLACE}"),
        ("SearchShape", rf"search\(\) gave shape .* at {PLACE}; expected \(group, queries, ids\)"),
        ("AttendFuture", rf"returned a future key, \d+, at {PLACE}"),
        ("AttendTwice", rf"returned key \d+ twice at {PLACE}"),
        ("AttendHidden", rf"returned a key that the query can't see, \d+, at {PLACE}"),
        ("AttendNan", rf"attend\(\) gave NaN at {PLACE}"),
        ("AttendShape", rf"attend\(\) gave an output of shape .* at {PLACE}"),
        ("future", rf"returned a future key, \d+, at {PLACE}"),
    ],
)
def test_bad_answers(
    make_trace: Callable[..., Trace], rules: Any, write_methods: Any, method: str, message: str
) -> None:
    # A window of 8 has no index: all that it holds is new.
    trace = make_trace(rules(window=40 if method.startswith("Search") else 8))
    with pytest.raises(RetraceError, match=rf"^mine\.py:{method} {message}"):
        analyze(trace, [f"{write_methods(BAD)}:{method}"], [2], keep_exact=False)


def test_a_second_layer_is_checked_too(
    make_trace: Callable[..., Trace], rules: Any, write_methods: Any
) -> None:
    body = """
    @dataclass(frozen=True, kw_only=True)
    class Late(ScoreMethod):
        def build(self, past):
            return past.keys, past.group

        def scores(self, state, queries, positions):
            keys, group = state
            scores = queries @ keys.T
            if (group.layer, group.kv_head) == (1, 1):
                scores[1, positions == 30] = torch.nan
            return scores
    """
    trace = make_trace([rules(heads=4), rules(heads=4)])
    place = "layer 1, head 3, sequence 0, position 30"
    with pytest.raises(RetraceError, match=rf"Late scores\(\) gave NaN at {place}"):
        analyze(trace, [f"{write_methods(body)}:Late"], [2], keep_exact=False)


def test_a_search_may_find_less(
    make_trace: Callable[..., Trace], rules: Any, write_methods: Any
) -> None:
    body = """
    @dataclass(frozen=True, kw_only=True)
    class Nothing(SearchMethod):
        def extend(self, state, new):
            return state

        def search(self, state, queries, k):
            return torch.full((*queries.shape[:2], k), -1)
    """
    spec = f"{write_methods(body)}:Nothing"
    trace = make_trace(rules(), [40], queries=[[16, 24]])
    rows = analyze(trace, [spec], [1], min_context=0, keep_exact=False).metrics
    density = rows[rows.metric == "density"]["mean"]
    # The keys since the index was built are always searched: one at position 16.
    assert (density > 0).all()


@pytest.mark.parametrize("end", [40, 4000])
def test_a_repeated_key_is_found_in_short_and_long_lists(end: int) -> None:
    rng = np.random.default_rng(0)
    lists = [rng.permutation(end)[:30] for _ in range(20)]
    ids = torch.from_numpy(np.stack(lists))
    ids[:, 25:] = -1
    assert not _repeated(ids[None], end).any()
    ids[4, 7] = ids[4, 21]
    ids[9, 0] = ids[9, 1]
    found = _repeated(ids[None], end)[0]
    assert found.any(dim=-1).nonzero().flatten().tolist() == [4, 9]
    assert set(ids[found].tolist()) == {int(ids[4, 7]), int(ids[9, 0])}
