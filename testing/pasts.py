"""A past from tensors, so a method's own functions can be called in a test."""

from typing import Any

import torch
from torch import Tensor

from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import make_units
from retrace.traces import LayerRules, RetraceError


def make_past(
    keys: Tensor,
    values: Tensor | None = None,
    queries: Tensor | None = None,
    *,
    end: int | None = None,
    calibration: dict[str, Tensor] | None = None,
    **rules: Any,
) -> Past:
    """The past of one kv head that holds these tensors.

    Args:
        keys: (keys, channels), of any floating type; a method meets them in float32.
        values: of the same keys (keys, value_channels); zeros with the channels of a key if None.
        queries: one for each key and query head (group, keys, channels), not yet scaled; zeros of
            one head if None.
        end: the position that the past ends at; all keys if None.
        calibration: what the method's `calibrate` gave, by name.
        rules: fields of `LayerRules` other than its sizes: `scale` (1 / sqrt(channels) if not
            given), `window`, `softcap`, `sinks`, `rotation`.

    Returns:
        What `build`, `importance` and `extend` are handed.

    Raises:
        RetraceError: the shapes do not fit each other.

    >>> make_past(torch.ones(5, 8), end=3).keys.shape
    torch.Size([3, 8])
    """
    if keys.ndim != 2:
        raise RetraceError(f"keys are {tuple(keys.shape)}: expected (keys, channels).")
    count, channels = keys.shape
    values = torch.zeros_like(keys) if values is None else values
    queries = keys.new_zeros(1, count, channels) if queries is None else queries
    if values.ndim != 2 or len(values) != count:
        raise RetraceError(
            f"values are {tuple(values.shape)}: expected ({count}, value_channels), one for each "
            "key."
        )
    if queries.ndim != 3 or queries.shape[1:] != keys.shape:
        raise RetraceError(
            f"queries are {tuple(queries.shape)}: expected (group, {count}, {channels}), one for "
            "each key and head."
        )
    if end is not None and not 0 < end <= count:
        raise RetraceError(f"end={end}: expected 1 to {count}, the number of keys.")
    known = LayerRules(
        module="layer",
        heads=len(queries),
        kv_heads=1,
        key_dim=channels,
        value_dim=values.shape[1],
        **{"scale": channels**-0.5, **rules},
    )
    positions = torch.arange(count, device=keys.device)
    tensors = queries, keys[None], values[None]
    (unit,) = make_units(0, 0, known, tensors, positions, None)
    return Past(unit, 0, count if end is None else end, calibration or {})
