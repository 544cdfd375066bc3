"""Traces of random tensors, for what depends on shapes alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrace.traces import LayerRules, create_trace
from retrace.traces.schema import DTYPES


def write_random(
    path: Path,
    positions: int,
    queries: Sequence[int] | np.ndarray[Any, Any],
    *,
    layers: int = 1,
    heads: int = 32,
    kv_heads: int = 8,
    channels: int = 128,
    dtype: str = "bfloat16",
) -> None:
    """Write a trace of one sequence through the trace's own writer, with the queries of these
    positions; by default one layer as that of a Llama with 8 billion parameters."""
    generator = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray[Any, Any]:
        return generator.standard_normal(shape, np.float32).astype(DTYPES[dtype])

    writer = create_trace(
        path,
        rules={
            layer: LayerRules(f"layers.{layer}", heads, kv_heads, channels, channels, 0.2)
            for layer in range(layers)
        },
        tokens=[np.zeros(positions, np.int32)],
        query_positions=[np.asarray(queries, np.int32)],
        dtype=dtype,
        attributes={"model": "random", "task": "none"},
    )
    for layer in range(layers):
        query, key = random(heads, len(queries), channels), random(kv_heads, positions, channels)
        writer.write_layer(0, layer, query, key, random(kv_heads, positions, channels))
    writer.finish_sequence(0, np.zeros(positions, np.float32))
    writer.close()
