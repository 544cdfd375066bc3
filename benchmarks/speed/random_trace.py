"""Traces of random tensors, for what depends on shapes alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrace.traces import LayerRules, create_trace, to_numpy

CLUSTERS = 200


def write_random(
    path: Path,
    positions: int,
    queries: Sequence[int] | np.ndarray[Any, Any],
    *,
    sequences: int = 1,
    layers: int = 1,
    heads: int = 32,
    kv_heads: int = 8,
    channels: int = 128,
    dtype: str = "bfloat16",
    device: str | torch.device = "cpu",
    alike: int = 0,
) -> None:
    """Write a trace of sequences through the trace's own writer, with the queries of these
    positions; by default one sequence, and one layer as that of a Llama with 8 billion parameters.
    The device draws the numbers. With `alike`, so many neighbouring keys are alike: one of
    `CLUSTERS` centres, which queries lean towards."""
    generator = torch.Generator(device).manual_seed(0)
    kind: torch.dtype = getattr(torch, dtype)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def any_centre(centres: torch.Tensor, count: int) -> torch.Tensor:
        which = torch.randint(CLUSTERS, (count,), generator=generator, device=device)
        return centres[which]

    writer = create_trace(
        path,
        rules={
            layer: LayerRules(f"layers.{layer}", heads, kv_heads, channels, channels, 0.2)
            for layer in range(layers)
        },
        tokens=[np.zeros(positions, np.int32)] * sequences,
        query_positions=[np.asarray(queries, np.int32)] * sequences,
        dtype=dtype,
        attributes={"model": "random", "task": "none"},
    )
    for sequence in range(sequences):
        for layer in range(layers):
            query = random(heads, len(queries), channels)
            key, value = (random(kv_heads, positions, channels) for _ in range(2))
            if alike:
                centres = random(CLUSTERS, channels)
                near = any_centre(centres, -(-positions // alike)).repeat_interleave(alike, dim=0)
                key = near[:positions] + 0.15 * key
                query = any_centre(centres, len(queries)) + 0.35 * query
            tensors = (to_numpy(tensor.to(kind)) for tensor in (query, key, value))
            writer.write_layer(sequence, layer, *tensors)
        writer.finish_sequence(sequence, np.zeros(positions, np.float32))
    writer.close()
