"""The rules of a layer: what they may be, and who sees whom."""

from collections.abc import Callable
from typing import Any

import pytest

from retrace.traces import LayerRules, RetraceError

Rules = Callable[..., LayerRules]


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 3},
        {"heads": 0},
        {"kv_heads": 0},
        {"key_dim": 0},
        {"value_dim": -1},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"window": 0},
        {"chunk": 0},
        {"sinks": (1.0, 2.0)},
    ],
    ids=str,
)
def test_mistakes_are_refused(rules: Rules, changes: dict[str, Any]) -> None:
    with pytest.raises(RetraceError, match=r"model\.layers\.0"):
        rules(**changes)


def test_group(rules: Rules) -> None:
    assert rules().group == 2
    assert rules(heads=6, kv_heads=1).group == 6
    assert rules(heads=2).group == 1


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, [0] * 10),
        ({"window": 1}, list(range(10))),
        ({"window": 4}, [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]),
        ({"window": 99}, [0] * 10),
        ({"chunk": 4}, [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]),
        ({"chunk": 4, "window": 2}, [0, 0, 1, 2, 4, 4, 5, 6, 8, 8]),
    ],
    ids=str,
)
def test_first_visible(rules: Rules, changes: dict[str, Any], first: list[int]) -> None:
    assert [rules(**changes).first_visible(i) for i in range(10)] == first


@pytest.mark.parametrize(
    "changes", [{}, {"window": 5, "softcap": 30.0}, {"sinks": (0.1, -2.0, 3.0, 0.0)}], ids=str
)
def test_attributes_round_trip(rules: Rules, changes: dict[str, Any]) -> None:
    wanted = rules(**changes)
    assert LayerRules.from_attributes({**wanted.to_attributes(), "rope_theta": 1e4}) == wanted


def test_missing_attributes(rules: Rules) -> None:
    attributes = rules().to_attributes()
    del attributes["scale"]
    with pytest.raises(RetraceError, match=r"incomplete.*scale"):
        LayerRules.from_attributes(attributes)
