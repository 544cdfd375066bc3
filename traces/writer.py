"""Writing a trace: the plan first, then one sequence after another, each marked when complete."""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from retrace.traces.bfloat16 import register
from retrace.traces.errors import RetraceError
from retrace.traces.location import Location, RemoteLocation, explained, open_store
from retrace.traces.reader import open_trace
from retrace.traces.schema import (
    DTYPES,
    FORMAT_KEY,
    FORMAT_VERSION,
    PHASES,
    TENSOR_AXES,
    LayerRules,
)
from retrace.traces.storage.durable import remove_all, sync_all, sync_path
from retrace.traces.storage.shards import shard_length, write_row, write_shard

register()

CHUNK_POSITIONS = 16384
"""Longest run of positions in one inner chunk."""
SHARD_BYTES = 1 << 28
"""A sequence's tensor of a layer is one shard up to this size; above, several along position.

What is written is in memory a shard at a time; a disk is no faster with larger ones."""


class TraceWriter:
    """Writes the tensors of one trace, sequence by sequence.

    Made by `create_trace` or `resume_trace`. One sequence's tensor of a layer is one shard, and the
    small arrays have one sequence per chunk, so that no two sequences share a stored object.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        store = open_store(path, read_only=False)
        with explained(path):
            self._group = zarr.open_group(store, mode="r+", use_consolidated=False, zarr_format=3)
        self._tensors: dict[str, zarr.Array[Any]] = {}  # opened once: each costs a read

    def write_layer(
        self,
        sequence: int,
        layer: int,
        query: npt.NDArray[Any],
        key: npt.NDArray[Any],
        value: npt.NDArray[Any],
    ) -> None:
        """Store one layer's tensors of one sequence, in the trace's dtype.

        Shapes: query (heads, queries, channels), key (kv_heads, positions, channels),
        value (kv_heads, positions, value channels).
        """
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            length = self.shard_length(layer, name)
            for start in range(0, tensor.shape[1], length):
                self.write_shard(sequence, layer, name, start, tensor[:, start : start + length])

    def shard_length(self, layer: int, name: str) -> int:
        """Positions of one shard of a layer's query, key or value."""
        return shard_length(self._tensor(layer, name))

    def write_shard(
        self, sequence: int, layer: int, name: str, start: int, part: npt.NDArray[Any]
    ) -> None:
        """Store `part` (heads, positions, channels) of a layer's query, key or value, from position
        `start` on: a whole shard, or what the sequence has of its last one.

        May be called on several threads at once, for different shards. On a local disk the shard
        is there for good when this returns.
        """
        array = self._tensor(layer, name)
        if part.dtype != array.dtype:
            raise TypeError(f"{name} is {part.dtype}, the trace stores {array.dtype}.")
        with explained(self.path):
            write_shard(array, sequence, start, part)

    def finish_sequence(
        self,
        sequence: int,
        nll: npt.NDArray[np.float32],
        kl: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Store the negative log-likelihoods (positions,), and the divergences (positions,) from
        the exact model where there are some, and mark the sequence complete."""
        with explained(self.path):
            for name, figures in (("nll", nll), ("kl", kl)):
                if figures is not None:
                    array = self._array(name)
                    row = np.full(array.shape[1:], np.nan, np.float32)
                    row[: len(figures)] = figures
                    write_row(array, sequence, row)
            write_row(self._array("done"), sequence, np.array(True))

    def close(self) -> None:
        """Write the consolidated metadata of a trace that will not grow any more."""
        with explained(self.path), warnings.catch_warnings():
            # Consolidated metadata is an extension of Zarr v3; readers without it lose nothing.
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(self._group.store)
        if isinstance(self.path, Path):
            sync_path(self.path / "zarr.json")
            sync_path(self.path)

    def _tensor(self, layer: int, name: str) -> "zarr.Array[Any]":
        key = f"layers/{layer}/{name}"
        if key not in self._tensors:
            self._tensors[key] = self._array(key)
        return self._tensors[key]

    def _array(self, name: str) -> "zarr.Array[Any]":
        with explained(self.path):
            array = self._group[name]
        assert isinstance(array, zarr.Array)
        return array


def create_trace(
    path: Location,
    *,
    rules: Mapping[int, LayerRules],
    tokens: Sequence[npt.NDArray[np.int32]],
    query_positions: Sequence[npt.NDArray[np.int32]],
    dtype: str,
    attributes: Mapping[str, Any],
    phases: Sequence[npt.NDArray[np.int8]] | None = None,
    diverges: bool = False,
) -> TraceWriter:
    """Create a trace that holds its whole plan and no tensors yet.

    Args:
        path: where; must not exist.
        rules: the rules of every recorded layer, by layer index.
        tokens: token ids (positions,) of each sequence.
        query_positions: positions (queries,) of the queries that are kept, of each sequence.
        dtype: element type of the tensors, a name in `DTYPES`.
        attributes: what else is to be known of the trace: model, task, settings, versions.
        phases: what each position (positions,) of each sequence is, a code in `PHASES`; context
            by default.
        diverges: whether sequences are finished with their divergence from an exact model.
    """
    if path.exists():
        raise RetraceError(f"{path} exists already.")
    if isinstance(path, RemoteLocation):
        with explained(path):
            # Nothing can be renamed there: without a version it is a trace that is half begun.
            store = open_store(path, read_only=False)
            group = zarr.open_group(store, mode="w", attributes={FORMAT_KEY: None})
            _create_arrays(group, rules, tokens, query_positions, phases, dtype, diverges)
            group.attrs.update({FORMAT_KEY: FORMAT_VERSION, "dtype": dtype, **attributes})
        return TraceWriter(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Built aside and renamed, so that a trace either holds its whole plan or is not there.
    aside = path.with_name(f".{path.name}.new")
    remove_all(aside)  # a link too, by which another folder would be emptied
    try:
        group = zarr.open_group(
            aside, mode="w", attributes={FORMAT_KEY: FORMAT_VERSION, "dtype": dtype, **attributes}
        )
        _create_arrays(group, rules, tokens, query_positions, phases, dtype, diverges)
        sync_all(aside)
        aside.rename(path)
        sync_path(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return TraceWriter(path)


def resume_trace(
    path: Location,
    *,
    rules: Mapping[int, LayerRules],
    tokens: Sequence[npt.NDArray[np.int32]],
    query_positions: Sequence[npt.NDArray[np.int32]],
    dtype: str,
    attributes: Mapping[str, Any],
    phases: Sequence[npt.NDArray[np.int8]] | None = None,
) -> TraceWriter:
    """Go on with an interrupted trace; refuses one that was planned differently.

    `attributes` names the ones that must be equal; others in the trace are left alone.
    """
    trace = open_trace(path)
    trace.check_arrays()
    ours = {"dtype": dtype, **attributes}
    different = [name for name, value in ours.items() if trace.attributes.get(name) != value]
    if trace.planned != len(tokens) or any(
        not np.array_equal(trace.tokens(s), t) for s, t in enumerate(tokens)
    ):
        different.append("tokens")
    elif any(
        not np.array_equal(trace.query_positions(s), q) for s, q in enumerate(query_positions)
    ):
        different.append("queries")
    elif any(
        not np.array_equal(trace.phase(s), p) for s, p in enumerate(phases or _all_context(tokens))
    ):
        different.append("phases")
    if trace.layers != tuple(rules) or any(trace.layer(i).rules != rules[i] for i in rules):
        different.append("layers")
    if different:
        raise RetraceError(
            f"{path} was captured with other {', '.join(different)}: resume it with the settings "
            "that it was started with, or start anew with --overwrite."
        )
    return TraceWriter(path)


def tensor_bytes(
    rules: Mapping[int, LayerRules],
    tokens: Sequence[npt.NDArray[np.int32]],
    query_positions: Sequence[npt.NDArray[np.int32]],
    dtype: str,
) -> int:
    """Bytes that the tensors of a trace of this plan take on disk."""
    positions = max(len(t) for t in tokens)
    queries = max(len(q) for q in query_positions)
    per_sequence = sum(
        queries * r.heads * r.key_dim + positions * r.kv_heads * (r.key_dim + r.value_dim)
        for r in rules.values()
    )
    return per_sequence * len(tokens) * DTYPES[dtype].itemsize


def _create_arrays(
    group: zarr.Group,
    rules: Mapping[int, LayerRules],
    tokens: Sequence[npt.NDArray[np.int32]],
    query_positions: Sequence[npt.NDArray[np.int32]],
    phases: Sequence[npt.NDArray[np.int8]] | None,
    dtype: str,
    diverges: bool,
) -> None:
    _create_small_arrays(group, tokens, query_positions, phases or _all_context(tokens), diverges)
    positions = max(len(t) for t in tokens)
    queries = max(len(q) for q in query_positions)
    for layer, layer_rules in rules.items():
        _create_layer(group, layer, layer_rules, len(tokens), positions, queries, dtype)


def _all_context(tokens: Sequence[npt.NDArray[np.int32]]) -> list[npt.NDArray[np.int8]]:
    """Phases (positions,) of sequences that are all context."""
    return [np.full(len(t), PHASES["context"], np.int8) for t in tokens]


def _create_small_arrays(
    group: zarr.Group,
    tokens: Sequence[npt.NDArray[np.int32]],
    query_positions: Sequence[npt.NDArray[np.int32]],
    phases: Sequence[npt.NDArray[np.int8]],
    diverges: bool,
) -> None:
    """The arrays with one chunk per sequence; all but `nll`, `kl` and `done` are filled at once."""
    count = len(tokens)

    # Nothing is written twice: of two writes to an object store the first may arrive last, when it
    # timed out and was given up.
    def create(
        name: str,
        axes: tuple[str, ...],
        extent: tuple[int, ...],
        dtype: str,
        fill: Any,
        attributes: dict[str, Any] | None = None,
    ) -> "zarr.Array[Any]":
        return group.create_array(
            name,
            shape=(count, *extent),
            chunks=(1, *extent),
            dtype=dtype,
            fill_value=fill,
            compressors=(Crc32cCodec(),),
            dimension_names=("sequence", *axes),
            attributes=attributes,
        )

    positions = max(len(t) for t in tokens)
    queries = max(len(q) for q in query_positions)
    token_array = create("tokens", ("position",), (positions,), "int32", -1)
    length_array = create("length", (), (), "int32", 0)
    query_array = create("query_positions", ("query_position",), (queries,), "int32", -1)
    phase_array = create("phase", ("position",), (positions,), "int8", -1, {"codes": PHASES})
    for name in ("nll", "kl") if diverges else ("nll",):
        create(name, ("position",), (positions,), "float32", float("nan"))
    create("done", (), (), "bool", False)
    for s in range(count):
        token_array[s, : len(tokens[s])] = tokens[s]
        length_array[s] = len(tokens[s])
        phase_array[s, : len(tokens[s])] = phases[s]
        query_array[s, : len(query_positions[s])] = query_positions[s]


def _create_layer(
    group: zarr.Group,
    layer: int,
    rules: LayerRules,
    sequences: int,
    positions: int,
    queries: int,
    dtype: str,
) -> None:
    layer_group = group.create_group(f"layers/{layer}", attributes=rules.to_attributes())
    shapes = {
        "query": (rules.heads, queries, rules.key_dim),
        "key": (rules.kv_heads, positions, rules.key_dim),
        "value": (rules.kv_heads, positions, rules.value_dim),
    }
    for name, (heads, length, channels) in shapes.items():
        chunk_length = min(length, CHUNK_POSITIONS)
        chunk_bytes = heads * chunk_length * channels * DTYPES[dtype].itemsize
        chunks_per_shard = max(1, min(-(-length // chunk_length), SHARD_BYTES // chunk_bytes))
        layer_group.create_array(
            name,
            shape=(sequences, heads, length, channels),
            chunks=(1, 1, chunk_length, channels),
            shards=(1, heads, chunks_per_shard * chunk_length, channels),
            dtype=DTYPES[dtype],
            # Post-RoPE tensors compress by a few per cent only; a checksum is worth more.
            compressors=(Crc32cCodec(),),
            dimension_names=TENSOR_AXES[name],
        )
