"""Small traces of random numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.traces import LayerRules, TraceWriter, create_trace
from retrace.traces.schema import DTYPES

Array = np.ndarray[Any, np.dtype[Any]]


def layer_rules(**changes: Any) -> LayerRules:
    """Rules of a layer of 4 heads over 2 kv heads, with 6 key and 3 value channels."""
    sizes = {"module": "model.layers.0", "heads": 4, "kv_heads": 2, "key_dim": 6, "value_dim": 3}
    return LayerRules(**{**sizes, "scale": 0.25, **changes})


def random_bits(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Array:
    """Numbers of any bit pattern: NaN payloads, infinities, subnormals and negative zeros."""
    kind = DTYPES[dtype]
    unsigned = np.dtype(f"u{kind.itemsize}")
    bits = rng.integers(0, np.iinfo(unsigned).max, shape, unsigned, endpoint=True)
    # The exponent's extremes are rare in wide types: every fourth number has one of them.
    exponent = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}[dtype]
    ones = unsigned.type((1 << (kind.itemsize * 8 - 1 - exponent)) - 1)
    mask = unsigned.type(int(ones) << exponent)
    flat = bits.reshape(-1)
    flat[::4] |= mask  # infinities and NaN
    flat[1::4] &= ~mask  # zeros and subnormals
    flat[:4:4] = mask
    return bits.view(kind)


@dataclass(frozen=True)
class TracePlan:
    """What a trace is created with, and the tensors that belong to it."""

    arguments: dict[str, Any]
    tensors: dict[tuple[int, int], tuple[Array, Array, Array]]
    """By layer and sequence."""
    nll: list[Array]

    def fill(self, writer: TraceWriter, sequences: Sequence[int]) -> None:
        """Write all layers of some sequences and mark them complete; with them those that share
        their shards."""
        for bundle in dict.fromkeys(writer.bundle_of(sequence) for sequence in sequences):
            for layer in self.arguments["rules"]:
                if len(bundle) == 1:
                    writer.write_layer(bundle.start, layer, *self.tensors[layer, bundle.start])
                    continue
                parts_of = zip(*(self.tensors[layer, s] for s in bundle), strict=True)
                named = zip(("query", "key", "value"), parts_of, strict=True)
                for name, parts in named:
                    writer.write_shard(bundle, layer, name, 0, parts)
            writer.finish_bundle(bundle, [self.nll[sequence] for sequence in bundle])


@pytest.fixture
def make_plan() -> Callable[..., TracePlan]:
    """A function that plans a trace of ragged sequences with tensors of random bits."""

    def make(
        dtype: str = "float32",
        lengths: Sequence[int] = (9, 1, 14),
        rules: Mapping[int, LayerRules] | None = None,
        queries: Sequence[Sequence[int]] | None = None,
        seed: int = 0,
    ) -> TracePlan:
        rng = np.random.default_rng(seed)
        rules = rules or {0: layer_rules(), 3: layer_rules(module="model.layers.3", window=5)}
        positions = [
            np.arange(n, dtype=np.int32) if queries is None else np.array(queries[s], np.int32)
            for s, n in enumerate(lengths)
        ]
        tokens = [rng.integers(0, 999, n).astype(np.int32) for n in lengths]
        tensors = {
            (layer, s): (
                random_bits((r.heads, len(positions[s]), r.key_dim), dtype, rng),
                random_bits((r.kv_heads, n, r.key_dim), dtype, rng),
                random_bits((r.kv_heads, n, r.value_dim), dtype, rng),
            )
            for layer, r in rules.items()
            for s, n in enumerate(lengths)
        }
        nll = [rng.random(n, np.float32) for n in lengths]
        for likelihoods in nll:
            likelihoods[-1] = np.nan
        return TracePlan(
            {
                "rules": rules,
                "tokens": tokens,
                "query_positions": positions,
                "dtype": dtype,
                "attributes": {"model": "random", "task": "none"},
            },
            tensors,
            nll,
        )

    return make


@pytest.fixture
def write_trace(tmp_path: Path, make_plan: Callable[..., TracePlan]) -> Callable[..., Path]:
    """A function that writes a whole trace and returns where it is."""

    def write(name: str = "trace", *, bundle: int = 1, **plan: Any) -> Path:
        planned = make_plan(**plan)
        writer = create_trace(tmp_path / f"{name}.zarr", **planned.arguments, bundle=bundle)
        planned.fill(writer, range(len(planned.nll)))
        writer.close()
        return writer.path

    return write


@pytest.fixture
def rules() -> Callable[..., LayerRules]:
    """Rules of a small layer, with changes."""
    return layer_rules
