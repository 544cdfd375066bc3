"""Attention sinks and the newest keys."""

from collections.abc import Callable
from typing import Any

import pytest

from retrace.analyze import analyze
from retrace.traces import LayerRules, Trace


def sinks_and_newest(query: Any, k: int) -> list[int]:
    """The first four positions, the query's own, and the newest others while there is budget."""
    visible = set(query.visible)
    ids = [j for j in range(4) if j in visible]
    if query.position not in ids:
        ids.append(query.position)
    for j in range(query.position - 1, -1, -1):
        if len(ids) < k and j in visible and j not in ids:
            ids.append(j)
    return ids


@pytest.mark.parametrize("k", [1, 4, 5, 9])
def test_figures(
    make_trace: Callable[..., Trace],
    expected: Any,
    assert_figures: Any,
    any_rules: LayerRules,
    k: int,
) -> None:
    trace = make_trace(any_rules)
    results = analyze(trace, ["window"], [k], min_context=0, keep_exact=False)
    assert_figures(results, "window", k, expected(trace, sinks_and_newest, k, first=0))
