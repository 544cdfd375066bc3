"""Bytes of layers whose heads share one cache of latent vectors, counted by hand."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze, recommend
from retrace.traces import LayerRules, Trace

LATENT = {
    "heads": 4,
    "kv_heads": 4,
    "key_dim": 24,
    "value_dim": 12,
    "cached_bytes": (16 + 8) * 2,
}
"""A layer as DeepSeek-V3 has them: 16 latent channels and 8 that are rotated, in bfloat16."""
EXPANDED = 4 * (24 + 12) * 2
FIRST = 9
"""The first query that counts."""
APART = """
    @dataclass(frozen=True, kw_only=True)
    class Apart(ScoreMethod):
        "The exact best keys of each head, of an index that costs nothing."
        holds_keys = False

        def scores(self, state, queries, positions):
            return queries @ state.keys.T

    @dataclass(frozen=True, kw_only=True)
    class Indexed(Apart):
        "The same by an index of a byte a key, from all but the newest keys."
        holds_keys = None

        def aux_bytes(self, state, keys, group):
            return keys

    @dataclass(frozen=True, kw_only=True)
    class Own(Apart):
        "The same with keys and values of its own, of 5 bytes."
        holds_keys = None

        def aux_bytes(self, state, keys, group):
            return 0.0 * keys

        def attended_bytes(self, group):
            return 5.0

    @dataclass(frozen=True, kw_only=True)
    class Searched(SearchMethod):
        "Nothing found: keys that joined since the index was built are searched exactly."
        holds_keys = False

        def search(self, state, queries, k):
            return torch.full((*queries.shape[:2], k), -1)

        def extend(self, state, new):
            return state
"""


@pytest.fixture
def trace(make_trace: Callable[..., Trace], rules: Callable[..., LayerRules]) -> Trace:
    return make_trace(rules(**LATENT), [41, 23, 33])


@pytest.fixture
def ratio(trace: Trace) -> Callable[..., Sequence[float]]:
    """A function that gives the mean and deviation of a method's `bytes_ratio`."""

    def of(method: str, k: int, **options: Any) -> Sequence[float]:
        options = {"min_context": FIRST, "keep_exact": False, **options}
        rows = analyze(trace, [method], [k], **options).metrics
        rows = rows[rows["metric"] == "bytes_ratio"]
        assert len(rows) == 4
        figures = rows[["mean", "std", "count"]].drop_duplicates()
        assert len(figures) == 1, "the same for each head"
        return [float(x) for x in figures.iloc[0]]

    return of


def by_position(trace: Trace, queries_of: Any) -> list[list[Any]]:
    """The queries of all heads at one position of a sequence, together."""
    found = defaultdict(list)
    for (query,) in queries_of(trace):
        found[query.keys.shape[0], query.position].append(query)
    return [heads for (_, position), heads in found.items() if position >= FIRST]


def counted(read: Sequence[float]) -> list[float]:
    return [np.mean(read), np.std(read), len(read)]


def test_all_heads_read_a_key_once(
    trace: Trace, ratio: Any, queries_of: Any, write_methods: Callable[[str], str]
) -> None:
    mine = write_methods(APART)
    cached, index, own = [], [], []
    for heads in by_position(trace, queries_of):
        assert len(heads) == 4
        visible = len(heads[0].visible)
        union = len(set().union(*(head.top(3) for head in heads)))
        assert 3 <= union <= 12
        cached.append(union / visible)
        index.append((union * 48 + 4 * visible) / (visible * 48))
        own.append(4 * 3 * 5 / (visible * 48))
    np.testing.assert_allclose(ratio(f"{mine}:Apart", 3), counted(cached))
    np.testing.assert_allclose(ratio(f"{mine}:Indexed", 3), counted(index))
    np.testing.assert_allclose(ratio(f"{mine}:Own", 3), counted(own))
    assert np.mean(cached) < 1 < np.mean(index) + 1


def test_an_index_of_expanded_keys_is_each_heads_own(
    trace: Trace, ratio: Any, queries_of: Any
) -> None:
    """Quest's two bounds of a page are of 24 channels in each of four heads."""
    floor = [
        4 * 2 * -(-len(heads[0].visible) // 4) * 24 * 2 / (len(heads[0].visible) * 48)
        for heads in by_position(trace, queries_of)
    ]
    mean = ratio("quest:page=4", 4)[0]
    assert np.mean(floor) + 4 / 41 < mean < np.mean(floor) + 1


@pytest.mark.parametrize("method", ["exact", "oracle-value", "dense"])
def test_all_keys_are_the_whole_cache(ratio: Any, method: str) -> None:
    """However many heads read all keys to rank them, and whatever they attend then."""
    np.testing.assert_allclose(ratio(method, 3)[:2], [1, 0], atol=1e-12)


def test_heads_that_agree(trace: Trace, ratio: Any, queries_of: Any) -> None:
    visible = [len(heads[0].visible) for heads in by_position(trace, queries_of)]
    np.testing.assert_allclose(ratio("window", 6), counted([6 / n for n in visible]))


def test_keys_beside_an_index(
    trace: Trace, ratio: Any, queries_of: Any, write_methods: Callable[[str], str]
) -> None:
    """Under `prefix:8` the index holds 8 keys, and all heads read the later ones to rank them."""
    read = [1 - 8 / len(heads[0].visible) for heads in by_position(trace, queries_of)]
    found = ratio(f"{write_methods(APART)}:Searched:step=99", 3, protocol="prefix:8")
    np.testing.assert_allclose(found, counted(read))


def test_budgets_and_blocks(trace: Trace, ratio: Any, write_methods: Callable[[str], str]) -> None:
    mine = f"{write_methods(APART)}:Apart"
    rows = analyze(trace, [mine, "window"], [6, 9], min_context=FIRST, keep_exact=False).metrics
    rows = rows[rows["metric"] == "bytes_ratio"].drop_duplicates(["method", "topk"])
    together = rows.set_index(["method", "topk"])["mean"]
    for k in (6, 9):
        assert together["mine.py:Apart", k] == pytest.approx(ratio(mine, k)[0])
        assert together["window", k] == pytest.approx(ratio("window", k)[0])


def test_other_layers_are_as_ever(
    make_trace: Callable[..., Trace], rules: Callable[..., LayerRules]
) -> None:
    plain = {**LATENT, "cached_bytes": None}
    mixed = make_trace([rules(**LATENT), rules(**plain)], [40], seed=3)
    alone = make_trace([rules(**plain), rules(**plain)], [40], seed=3)
    found, expected = (
        analyze(t, ["quest:page=4"], [4], min_context=9, keep_exact=False).metrics
        for t in (mixed, alone)
    )
    same = (found["layer"] == 1) | (found["metric"] != "bytes_ratio")
    assert found[same].equals(expected[same])
    others = found[~same]["mean"].to_numpy(), expected[~same]["mean"].to_numpy()
    assert (others[0] > others[1]).all()  # the index of all heads against a cache so small


def test_a_recommendation_chooses_for_all_heads(
    make_trace: Callable[..., Trace], rules: Callable[..., LayerRules]
) -> None:
    trace = make_trace(rules(**LATENT), [90] * 4)
    found = recommend(trace, "error_norm=2", ["window", "exact"], [4, 16], keep_exact=False)
    assert list(found.kv_heads["kv_head"]) == [0, 1, 2, 3]
    assert len(found.kv_heads[["method", "topk", "bytes_ratio"]].drop_duplicates()) == 1
    assert list(found.heads["kv_head"]) == [0, 1, 2, 3]
    assert found.facts["kv_bytes_per_position"] == {"0": 12.0}
    assert EXPANDED == 4 * 72
