"""A small trace of random tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrace.traces import LayerRules, Trace, create_trace, open_trace

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"window": 24},
    {"softcap": 8.0},
    {"sinks": (0.5, -1.0, 2.0, 4.0)},
)
"""Rules that layers of models differ by: none, a window, a softcap, and sinks of four heads."""


def make_trace(
    path: str | Path,
    *,
    layers: Sequence[Mapping[str, Any]] = KINDS,
    heads: int = 4,
    kv_heads: int = 2,
    channels: int = 16,
    sequences: int = 4,
    positions: int = 160,
    seed: int = 0,
) -> Trace:
    """Write a trace of random tensors in float32, as `capture` writes one of a model.

    Keys drift along the sequence and share a mean, so attention is neither flat nor on one key.

    Args:
        path: where; must not exist.
        layers: for each layer the fields of `LayerRules` that it has besides its sizes.
        heads: query heads of a layer.
        kv_heads: heads of keys and values; they divide the query heads.
        channels: of queries, keys and values.
        sequences: how many; methods that learn do so from the last quarter.
        positions: of each sequence, with a query at every one.
        seed: of the tensors.

    Returns:
        The trace, opened.

    Raises:
        RetraceError: something is there already, or the rules do not fit each other.
    """
    generator = np.random.default_rng(seed)
    rules = {
        index: LayerRules(
            module=f"layers.{index}.attention",
            heads=heads,
            kv_heads=kv_heads,
            key_dim=channels,
            value_dim=channels,
            **{"scale": channels**-0.5, **own},
        )
        for index, own in enumerate(layers)
    }
    every = np.arange(positions, dtype=np.int32)
    writer = create_trace(
        Path(path),
        rules=rules,
        tokens=[every + sequence for sequence in range(sequences)],
        query_positions=[every] * sequences,
        dtype="float32",
        attributes={"model": {"pretrained": "random"}, "task": [{"task": "random"}]},
    )
    for sequence in range(sequences):
        for index in rules:
            mean = generator.normal(size=(kv_heads, 1, channels))
            drift = generator.normal(size=(kv_heads, positions, channels)).cumsum(axis=1)
            drift /= np.sqrt(np.arange(1, positions + 1))[:, None]
            key = mean + drift + generator.normal(size=drift.shape)
            query = generator.normal(size=(heads, positions, channels))
            query += np.repeat(mean, heads // kv_heads, axis=0)
            value = generator.normal(size=key.shape)
            tensors = [tensor.astype(np.float32) for tensor in (query, key, value)]
            writer.write_layer(sequence, index, tensors[0], tensors[1], tensors[2])
        writer.finish_sequence(sequence, generator.random(positions, np.float32))
    writer.close()
    return open_trace(Path(path))
