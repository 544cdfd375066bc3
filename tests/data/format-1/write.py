"""Write a trace of format 1 and what is kept beside it, with the code that runs this."""

import sys
from pathlib import Path

import numpy as np

from retrace.analyze import analyze
from retrace.traces import LayerRules, create_trace, open_trace
from retrace.traces.schema import DTYPES

LENGTHS = (24, 17)


def write(folder: Path, dtype: str) -> None:
    """A trace of two layers and two sequences, its exact answers, a calibration and results."""
    rng = np.random.default_rng(7)
    sizes = {"heads": 2, "kv_heads": 1, "key_dim": 4, "value_dim": 4, "scale": 0.5}
    writer = create_trace(
        folder / f"{dtype}.zarr",
        rules={
            0: LayerRules(module="model.layers.0.self_attn", **sizes),
            1: LayerRules(
                module="model.layers.1.self_attn", window=9, softcap=8.0, sinks=(0.5, -1.0), **sizes
            ),
        },
        tokens=[rng.integers(0, 99, n).astype(np.int32) for n in LENGTHS],
        query_positions=[np.arange(n, dtype=np.int32) for n in LENGTHS],
        dtype=dtype,
        attributes={"model": "random", "task": "none"},
    )
    for sequence, length in enumerate(LENGTHS):
        for layer in (0, 1):
            query, key, value = (
                np.round(4 * rng.normal(size=(heads, length, 4))).astype(np.float32) / 4
                for heads in (2, 1, 1)
            )
            writer.write_layer(
                sequence, layer, *(t.astype(DTYPES[dtype]) for t in (query, key, value))
            )
        writer.finish_sequence(sequence, rng.random(length, np.float32))
    writer.close()
    analyze(
        open_trace(writer.path),
        ["exact", "quest:page=4", "loki:rank=2"],
        [2, 4],
        min_context=4,
        out=folder / f"{dtype}-results",
    )


if __name__ == "__main__":
    for dtype in ("float32", "bfloat16"):
        write(Path(sys.argv[1]), dtype)
