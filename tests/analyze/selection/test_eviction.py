"""Methods that keep the k most important keys of a past, and attend all that came since."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.traces import LayerRules, RetraceError, Trace

MakeTrace = Callable[..., Trace]
SMALL_KEYS = """
from retrace.analyze import EvictionMethod


@dataclass(frozen=True, kw_only=True)
class SmallKeys(EvictionMethod):
    '''The keys of least norm.'''

    def importance(self, past):
        return -past.keys.double().square().sum(dim=-1)
"""


def small_and_new(built_at: Callable[[int], int]) -> Callable[[Any, int], list[int]]:
    """All visible keys since the past ended, the newest first, and what is still seen of the k
    smallest of those that the first query after it saw."""

    def select(query: Any, k: int) -> list[int]:
        end = built_at(query.position)
        new = [int(j) for j in query.visible[::-1] if j >= end]
        then = [int(j) for j in replace(query, position=end).visible if j < end]
        norms = (query.keys**2).sum(axis=1)
        left = sorted(then, key=lambda j: (norms[j], j))[:k]
        return new + [j for j in left if j in query.visible]

    return select


def recall(query: Any, ids: list[int], k: int) -> float:
    """Over all keys attended, since those that are new do not count towards k."""
    return len(set(ids) & set(query.top(k))) / min(k, len(query.visible))


@pytest.mark.parametrize(
    ("protocol", "first", "built_at"),
    [
        ("prefix:30", 30, lambda i: 30),
        ("all:20", 0, lambda i: i // 20 * 20 if i >= 20 else 16 if i >= 16 else 0),
    ],
)
@pytest.mark.parametrize("k", [1, 5])
def test_figures(
    make_trace: MakeTrace,
    any_rules: LayerRules,
    expected: Any,
    assert_figures: Any,
    write_methods: Any,
    queries_of: Any,
    protocol: str,
    first: int,
    built_at: Callable[[int], int],
    k: int,
) -> None:
    trace = make_trace(any_rules)
    spec = f"{write_methods(SMALL_KEYS)}:SmallKeys"
    results = analyze(trace, [spec], [k], protocol=protocol, min_context=0, keep_exact=False)
    select = small_and_new(built_at)
    figures = expected(trace, select, k, first=first)
    assert_figures(results, "mine.py:SmallKeys", k, figures.drop("recall"))
    wanted: dict[int, list[float]] = {}
    for group in queries_of(trace):
        for query in group:
            if query.position >= first:
                found = recall(query, select(query, k), k)
                wanted.setdefault(query.head, []).append(found)
    rows = results.metrics[results.metrics.metric == "recall"].set_index("head")["mean"]
    for head, values in wanted.items():
        assert rows[head] == pytest.approx(np.mean(values), abs=1e-6)


def test_a_trace_without_queries_of_the_past_is_refused(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(heads=2, kv_heads=1), [90], queries=[range(64, 90)])
    with pytest.raises(RetraceError, match="snapkv judges keys by queries before position 64"):
        analyze(trace, ["snapkv"], [4], protocol="all:64", min_context=64, keep_exact=False)
    analyze(trace, ["snapkv"], [4], protocol="prefix:70", min_context=70, keep_exact=False)


def test_the_density_that_stands_for_a_budget_is_told(make_trace: MakeTrace, rules: Any) -> None:
    """Keys since the past ended come besides: two of 51 to 100 are not two per cent."""
    trace = make_trace(rules(), [100])
    results = analyze(trace, ["knorm"], [2], protocol="prefix:50", min_context=50, keep_exact=False)
    density = [(2 + i + 1 - 50) / (i + 1) for i in range(50, 100)]
    told = f"which attend {np.mean(density):.1%} of the keys they see."
    assert told in results.markdown()
