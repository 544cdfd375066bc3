"""Writing a trace: the plan first, then one bundle after another, each marked when complete."""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from retrace.traces.bfloat16 import register
from retrace.traces.bundles import MOST_SEQUENCES, bundles_of
from retrace.traces.errors import RetraceError
from retrace.traces.location import Location, RemoteLocation, explained, open_store
from retrace.traces.marks import MARK_AXES, Marks, check_marks, encoded_marks
from retrace.traces.reader import open_trace
from retrace.traces.schema import (
    DTYPES,
    FORMAT_KEY,
    FORMAT_VERSION,
    OUTPUT_PROJECTION,
    PHASES,
    PROJECTION_AXES,
    TENSOR_AXES,
    LayerRules,
    OutputProjection,
    layer_bytes,
    tensor_dtype,
    tensor_shapes,
)
from retrace.traces.storage.durable import remove_all, sync_all, sync_path
from retrace.traces.storage.shards import shard_length, write_rows, write_shard

register()

CHUNK_POSITIONS = 16384
"""Longest run of positions in one inner chunk."""
SHARD_BYTES = 1 << 28
"""A bundle's tensor of a layer is one shard up to this size; above, one sequence's is several along
position.

What is written is in memory a shard at a time; a disk is no faster with larger ones."""


class TraceWriter:
    """Writes the tensors of one trace, bundle by bundle.

    Made by `create_trace` or `resume_trace`. One bundle's tensor of a layer is one shard, and the
    small arrays have one bundle per chunk, so that no two bundles share a stored object. A bundle
    is written whole by one process, and again from its start where that was interrupted.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        store = open_store(path, read_only=False)
        with explained(path):
            self._group = zarr.open_group(store, mode="r+", use_consolidated=False, zarr_format=3)
        self._tensors: dict[str, zarr.Array[Any]] = {}  # opened once: each costs a read
        done = self._array("done")
        self._bundles = bundles_of(done.shape[0], done.chunks[0])

    def bundle_of(self, sequence: int) -> range:
        """The sequences that share shards with this one, itself included."""
        return self._bundles[sequence // len(self._bundles[0])]

    def write_layer(
        self,
        sequence: int,
        layer: int,
        query: npt.NDArray[Any],
        key: npt.NDArray[Any],
        value: npt.NDArray[Any],
        selected: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Store one layer's tensors of one sequence that is a bundle of its own, in the trace's
        dtype.

        Shapes: query (heads, queries, channels), key (kv_heads, positions, channels),
        value (kv_heads, positions, value channels), and selected (choices, queries, kept) of a
        layer that has an indexer.
        """
        bundle = range(sequence, sequence + 1)
        tensors = {"query": query, "key": key, "value": value, "selected": selected}
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            length = self.shard_length(layer, name)
            for start in range(0, tensor.shape[1], length):
                self.write_shard(bundle, layer, name, start, [tensor[:, start : start + length]])

    def shard_length(self, layer: int, name: str) -> int:
        """Positions of one shard of a layer's query, key, value or selected."""
        return shard_length(self._tensor(layer, name))

    def write_shard(
        self, bundle: range, layer: int, name: str, start: int, parts: Sequence[npt.NDArray[Any]]
    ) -> None:
        """Store what each sequence of a bundle has of a layer's query, key or value (heads,
        positions, channels), from position `start` on: a whole shard, or what the sequence has of
        its last one.

        May be called on several threads at once, for different shards. On a local disk the shard
        is there for good when this returns.
        """
        self._check_whole(bundle, parts)
        array = self._tensor(layer, name)
        if name == "selected":
            parts = [_as_wide(part, array.shape[-1]) for part in parts]
        for part in parts:
            if part.dtype != array.dtype:
                raise TypeError(f"{name} is {part.dtype}, the trace stores {array.dtype}.")
        with explained(self.path):
            write_shard(array, bundle.start, start, parts)

    def finish_sequence(
        self,
        sequence: int,
        nll: npt.NDArray[np.float32],
        kl: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Do for one sequence that is a bundle of its own what `finish_bundle` does."""
        self.finish_bundle(range(sequence, sequence + 1), [nll], None if kl is None else [kl])

    def finish_bundle(
        self,
        bundle: range,
        nll: Sequence[npt.NDArray[np.float32]],
        kl: Sequence[npt.NDArray[np.float32]] | None = None,
    ) -> None:
        """Store each sequence's negative log-likelihoods (positions,), and the divergences
        (positions,) from the exact model where there are some, and mark the bundle complete: all
        its sequences at once, or none."""
        self._check_whole(bundle, nll)
        with explained(self.path):
            for name, figures in (("nll", nll), ("kl", kl)):
                if figures is not None:
                    write_rows(self._array(name), bundle.start, _padded(figures, self._array(name)))
            write_rows(self._array("done"), bundle.start, np.ones(len(bundle), bool))

    def _check_whole(self, bundle: range, parts: Sequence[Any]) -> None:
        whole = self.bundle_of(bundle.start)
        if bundle != whole or len(parts) != len(whole):
            raise ValueError(
                f"Sequences {whole.start} to {whole.stop - 1} share shards, and are written "
                f"together: not {len(parts)} of them from {bundle.start} on."
            )

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
    marks: Sequence[Marks] | None = None,
    projections: Mapping[int, OutputProjection | str] | None = None,
    diverges: bool = False,
    bundle: int = 1,
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
        marks: named spans of positions of each sequence; none by default.
        projections: the output projection of each layer, or why it is left out; nothing is said of
            a layer that is not there.
        diverges: whether sequences are finished with their divergence from an exact model.
        bundle: how many consecutive sequences share each shard, by `bundle_size` for instance.
    """
    if path.exists():
        raise RetraceError(f"{path} exists already.")
    _check_bundle(bundle, tokens)
    phases = phases or _all_context(tokens)
    said = {FORMAT_KEY: 1 if bundle == 1 else FORMAT_VERSION, "dtype": dtype, **attributes}
    if isinstance(path, RemoteLocation):
        with explained(path):
            # Nothing can be renamed there: without a version it is a trace that is half begun.
            store = open_store(path, read_only=False)
            group = zarr.open_group(store, mode="w", attributes={FORMAT_KEY: None})
            _create_small_arrays(group, tokens, query_positions, phases, diverges, bundle)
            _create_layers(group, rules, tokens, query_positions, dtype, bundle, projections or {})
            _create_marks(group, marks, tokens, bundle)
            group.attrs.update(said)
        return TraceWriter(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Built aside and renamed, so that a trace either holds its whole plan or is not there.
    aside = path.with_name(f".{path.name}.new")
    remove_all(aside)  # a link too, by which another folder would be emptied
    try:
        group = zarr.open_group(aside, mode="w", attributes=said)
        _create_small_arrays(group, tokens, query_positions, phases, diverges, bundle)
        _create_layers(group, rules, tokens, query_positions, dtype, bundle, projections or {})
        _create_marks(group, marks, tokens, bundle)
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
    marks: Sequence[Marks] | None = None,
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
    elif any(
        trace.marks(s) != {name: tuple(spans) for name, spans in one.items() if spans}
        for s, one in enumerate(marks or [{}] * len(tokens))
    ):
        different.append("marks")
    if trace.layers != tuple(rules) or any(
        trace.layer(i).rules not in (rules[i], replace(rules[i], cached_bytes=None)) for i in rules
    ):  # which an earlier version did not tell
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
    each = (layer_bytes(r, positions, queries, dtype) for r in rules.values())
    return sum(each) * len(tokens)


def _create_layers(
    group: zarr.Group,
    rules: Mapping[int, LayerRules],
    tokens: Sequence[npt.NDArray[np.int32]],
    query_positions: Sequence[npt.NDArray[np.int32]],
    dtype: str,
    bundle: int,
    projections: Mapping[int, OutputProjection | str],
) -> None:
    positions = max(len(t) for t in tokens)
    queries = max(len(q) for q in query_positions)
    for layer, own in rules.items():
        projection = projections.get(layer)
        attributes = own.to_attributes() | _told(projection)
        layer_group = group.create_group(f"layers/{layer}", attributes=attributes)
        _create_layer(layer_group, own, len(tokens), positions, queries, dtype, bundle)
        if isinstance(projection, OutputProjection):
            _create_projection(layer_group, own, projection, dtype)


def _check_bundle(bundle: int, tokens: Sequence[npt.NDArray[np.int32]]) -> None:
    if not 1 <= bundle <= min(len(tokens), MOST_SEQUENCES):
        raise ValueError(f"A bundle of {len(tokens)} sequences cannot have {bundle}.")
    if bundle > 1 and max(len(t) for t in tokens) > CHUNK_POSITIONS:
        raise ValueError(f"Sequences of more than {CHUNK_POSITIONS} positions share no shard.")


def _all_context(tokens: Sequence[npt.NDArray[np.int32]]) -> list[npt.NDArray[np.int8]]:
    """Phases (positions,) of sequences that are all context."""
    return [np.full(len(t), PHASES["context"], np.int8) for t in tokens]


def _padded(rows: Sequence[npt.NDArray[Any]], array: "zarr.Array[Any]") -> npt.NDArray[Any]:
    """Rows of an array (sequence, ...), each filled up to the array's extent."""
    padded = np.full((len(rows), *array.shape[1:]), array.fill_value, array.dtype)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded


def _as_wide(selected: npt.NDArray[np.int32], width: int) -> npt.NDArray[np.int32]:
    """Choices of keys (choices, queries, kept) with so many places, of which the last are -1."""
    if bool((selected[..., width:] >= 0).any()):
        raise ValueError(f"A query chose more than {width} keys.")
    wide = np.full((*selected.shape[:2], width), -1, np.int32)
    wide[..., : selected.shape[-1]] = selected[..., :width]
    return wide


def _create_small_arrays(
    group: zarr.Group,
    tokens: Sequence[npt.NDArray[np.int32]],
    query_positions: Sequence[npt.NDArray[np.int32]],
    phases: Sequence[npt.NDArray[np.int8]],
    diverges: bool,
    bundle: int,
) -> None:
    """The arrays with one chunk per bundle; all but `nll`, `kl` and `done` are filled at once."""
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
            chunks=(bundle, *extent),
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
    lengths = np.array([len(t) for t in tokens], np.int32)
    for some in bundles_of(count, bundle):
        whole = slice(some.start, some.stop)
        token_array[whole] = _padded(tokens[whole], token_array)
        length_array[whole] = lengths[whole]
        phase_array[whole] = _padded(phases[whole], phase_array)
        query_array[whole] = _padded(query_positions[whole], query_array)


def _create_marks(
    group: zarr.Group,
    marks: Sequence[Marks] | None,
    tokens: Sequence[npt.NDArray[np.int32]],
    bundle: int,
) -> None:
    """The array of marks, filled, where a sequence has some."""
    if marks is None or not any(any(one.values()) for one in marks):
        return
    for one, own in zip(marks, tokens, strict=True):
        check_marks(one, len(own))
    names, rows = encoded_marks(marks)
    most = max(map(len, rows))
    array = group.create_array(
        "marks",
        shape=(len(rows), most, 3),
        chunks=(bundle, most, 3),
        dtype="int32",
        fill_value=-1,
        compressors=(Crc32cCodec(),),
        dimension_names=MARK_AXES,
        attributes={"names": names},
        # A sequence without marks says so: what is missing is damage.
        config={"write_empty_chunks": True},
    )
    for some in bundles_of(len(rows), bundle):
        whole = slice(some.start, some.stop)
        array[whole] = _padded(rows[whole], array)


def _told(projection: OutputProjection | str | None) -> dict[str, str]:
    """What a layer's attributes say of its output projection."""
    if projection is None:
        return {}
    if isinstance(projection, str):
        return {f"no_{OUTPUT_PROJECTION}": projection}
    return {OUTPUT_PROJECTION: projection.module}


def _create_projection(
    layer_group: zarr.Group, rules: LayerRules, projection: OutputProjection, dtype: str
) -> None:
    """The array of a layer's output projection, filled."""
    weights = projection.read()
    shape = (projection.hidden, rules.heads, rules.value_dim)
    if weights.shape != shape or weights.dtype != DTYPES[dtype]:
        raise ValueError(f"W_o is {weights.dtype} {weights.shape}, not {dtype} {shape}.")
    array = layer_group.create_array(
        OUTPUT_PROJECTION,
        shape=shape,
        chunks=shape,
        dtype=DTYPES[dtype],
        compressors=(Crc32cCodec(),),
        dimension_names=PROJECTION_AXES,
        config={"write_empty_chunks": True},  # what is missing is damage
    )
    array[:] = weights


def _create_layer(
    layer_group: zarr.Group,
    rules: LayerRules,
    sequences: int,
    positions: int,
    queries: int,
    dtype: str,
    bundle: int,
) -> None:
    for name, (heads, length, channels) in tensor_shapes(rules, positions, queries).items():
        element = tensor_dtype(name, dtype)
        chunk_length = min(length, CHUNK_POSITIONS)
        chunk_bytes = heads * chunk_length * channels * element.itemsize
        chunks_per_shard = max(1, min(-(-length // chunk_length), SHARD_BYTES // chunk_bytes))
        layer_group.create_array(
            name,
            shape=(sequences, heads, length, channels),
            chunks=(1, 1, chunk_length, channels),
            shards=(bundle, heads, chunks_per_shard * chunk_length, channels),
            dtype=element,
            # Post-RoPE tensors compress by a few per cent only; a checksum is worth more.
            compressors=(Crc32cCodec(),),
            dimension_names=TENSOR_AXES[name],
        )
