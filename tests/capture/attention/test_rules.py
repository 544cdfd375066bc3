"""Rules are read off masks and arguments, or the call is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from retrace.capture.attention.rules import check_arguments, mask_fits, read_rules
from retrace.traces import LayerRules, RetraceError

LENGTH = 12


def mask_of(window: int | None = None, chunk: int | None = None) -> Tensor:
    """Who sees whom, bool (1, 1, positions, positions), written out by definition."""
    seen = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for i in range(LENGTH):
        for j in range(i + 1):
            near = window is None or i - j < window
            seen[i, j] = near and (chunk is None or i // chunk == j // chunk)
    return seen[None, None]


def rules_of(mask: Tensor | None, **arguments: Any) -> LayerRules:
    """The rules of a call with this mask and these arguments."""
    query, key = torch.ones(1, 4, LENGTH, 16), torch.ones(1, 2, LENGTH, 16)
    return read_rules("layer", torch.nn.Module(), query, key, key[..., :8], mask, arguments)


@pytest.mark.parametrize(
    ("mask", "arguments", "extents"),
    [
        (None, {}, (None, None)),
        (None, {"sliding_window": 20}, (20, None)),
        (mask_of(), {}, (None, None)),
        (mask_of(), {"sliding_window": 12}, (12, None)),
        (mask_of(window=5), {"sliding_window": 5}, (5, None)),
        (mask_of(window=5), {}, (5, None)),
        (mask_of(window=1), {}, (1, None)),
        (mask_of(chunk=4), {}, (None, 4)),
        (mask_of(window=5).expand(3, -1, -1, -1), {}, (5, None)),
    ],
)
def test_windows_and_chunks(
    mask: Tensor | None, arguments: dict[str, Any], extents: tuple[int | None, int | None]
) -> None:
    rules = rules_of(mask, **arguments)
    assert (rules.window, rules.chunk) == extents


def test_other_rules() -> None:
    rules = rules_of(None, scaling=0.5, softcap=30.0, s_aux=torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert (rules.scale, rules.softcap, rules.sinks) == (0.5, 30.0, (0.0, 1.0, 2.0, 3.0))
    assert (rules.heads, rules.kv_heads, rules.key_dim, rules.value_dim) == (4, 2, 16, 8)
    assert rules_of(None).scale == 0.25  # 16 channels


HOLE = mask_of()
HOLE[0, 0, 9, 3] = False
ONE_OF_TWO = torch.cat([mask_of(), mask_of(window=3)])


@pytest.mark.parametrize(
    ("mask", "arguments", "message"),
    [
        (mask_of().float(), {}, "adds a float32 mask"),
        (HOLE, {}, "no window or chunk"),
        (ONE_OF_TWO, {}, "no window or chunk"),
        (mask_of(window=5), {"sliding_window": 4}, "not the window of 4"),
        (None, {"sliding_window": 5}, "not the window of 5"),
        (None, {"is_causal": False}, "not causal"),
        (torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), {}, "no window or chunk"),
    ],
)
def test_refused_masks(mask: Tensor | None, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RetraceError, match=message):
        rules_of(mask, **arguments)


@pytest.mark.parametrize("name", ["position_bias", "anything"])
def test_refused_arguments(name: str) -> None:
    check_arguments("layer", {name: None, "output_attentions": False})
    with pytest.raises(RetraceError, match=f"layer calls attention with '{name}'"):
        check_arguments("layer", {name: torch.ones(1)})


def test_masks_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrace.capture.attention.rules.BLOCK_ELEMENTS", 3 * LENGTH)
    rules = rules_of(mask_of(window=5))
    assert mask_fits(mask_of(window=5), LENGTH, rules)
    assert not mask_fits(mask_of(window=6), LENGTH, rules)
    assert not mask_fits(None, LENGTH, rules)
    assert mask_fits(None, 5, rules)
