"""Reading a trace: its plan, its finished sequences and their tensors, as NumPy arrays."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from retrace.traces.bfloat16 import register
from retrace.traces.errors import RetraceError
from retrace.traces.location import Location, RemoteLocation, locate, open_store
from retrace.traces.rotation import Rotation
from retrace.traces.schema import DTYPES, FORMAT_KEY, FORMAT_VERSION, LayerRules

register()


class Layer:
    """One recorded attention layer: its rules, and its tensors sequence by sequence."""

    def __init__(self, index: int, group: zarr.Group, trace: "Trace") -> None:
        self.index = index
        self.rules = LayerRules.from_attributes(group.attrs)
        self._group = group
        self.trace = trace
        """The trace that it is a layer of."""

    def query(
        self, sequence: int, heads: slice = slice(None), *, rotated: bool = True
    ) -> npt.NDArray[Any]:
        """Queries (heads, queries, channels), as attention saw them: after position encoding.

        With `rotated=False` as they were before it, in float32 (float64 where the trace is), which
        bfloat16 and float16 traces give no more exactly than they were stored.
        """
        positions = self.query_positions(sequence)
        queries = self._read("query", sequence, heads, len(positions))
        return queries if rotated else self._rotation().undo(queries, positions)

    def key(
        self, sequence: int, kv_heads: slice = slice(None), *, rotated: bool = True
    ) -> npt.NDArray[Any]:
        """Keys (kv_heads, positions, channels), as attention saw them: after position encoding.

        With `rotated=False` as they were before it, in the types that `query` gives.
        """
        length = self.trace.length(sequence)
        keys = self._read("key", sequence, kv_heads, length)
        return keys if rotated else self._rotation().undo(keys, np.arange(length))

    def value(self, sequence: int, kv_heads: slice = slice(None)) -> npt.NDArray[Any]:
        """Values (kv_heads, positions, value channels)."""
        return self._read("value", sequence, kv_heads, self.trace.length(sequence))

    def query_positions(self, sequence: int) -> npt.NDArray[np.int32]:
        """Positions (queries,) of the queries that were kept, ascending."""
        return self.trace.query_positions(sequence)

    def _rotation(self) -> Rotation:
        if self.rules.rotation is None:
            raise RetraceError(
                f"The position encoding of layer {self.index} ({self.rules.module}) is not known, "
                "so that rotated=False cannot undo it: read it as attention saw it."
            )
        return self.rules.rotation

    def _read(self, name: str, sequence: int, heads: slice, length: int) -> npt.NDArray[Any]:
        array = self._group[name]
        assert isinstance(array, zarr.Array)
        what = f"{name} of layer {self.index}, sequence {sequence}"
        return self.trace.read(array, (sequence, heads, slice(length)), what)


class Trace:
    """A captured trace: what was planned, what is finished, and the recorded layers.

    It is pickled as its place: another process opens it there.
    """

    def __init__(self, path: Location, group: zarr.Group) -> None:
        self.path = path
        self.attributes: dict[str, Any] = dict(group.attrs)
        self._group = group

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of queries, keys and values."""
        return DTYPES[self.attributes["dtype"]]

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Indices of the recorded layers, ascending."""
        layers = self._group["layers"]
        assert isinstance(layers, zarr.Group)
        return tuple(sorted(int(name) for name in layers.group_keys()))

    def layer(self, index: int) -> Layer:
        """The recorded layer of this index; refuses one that was not recorded."""
        if index not in self.layers:
            raise RetraceError(f"{self.path} has no layer {index}; it has {_ranges(self.layers)}.")
        group = self._group[f"layers/{index}"]
        assert isinstance(group, zarr.Group)
        return Layer(index, group, self)

    @property
    def planned(self) -> int:
        """How many sequences the capture set out to record."""
        return int(self._lengths.shape[0])

    @cached_property
    def sequences(self) -> tuple[int, ...]:
        """The sequences that are completely written; only these can be read."""
        done = self.read(self._small("done"), slice(None), "done")
        return tuple(int(s) for s in np.flatnonzero(done))

    def length(self, sequence: int) -> int:
        """Positions of a sequence, padding excluded."""
        return int(self._lengths[sequence])

    def tokens(self, sequence: int) -> npt.NDArray[np.int32]:
        """Token ids (positions,)."""
        place = (sequence, slice(self.length(sequence)))
        return self.read(self._small("tokens"), place, f"tokens of sequence {sequence}")

    def nll(self, sequence: int) -> npt.NDArray[np.float32]:
        """Negative log-likelihood of the next token (positions,); NaN at the last position."""
        place = (sequence, slice(self.length(sequence)))
        return self.read(self._small("nll"), place, f"nll of sequence {sequence}")

    def kl(self, sequence: int) -> npt.NDArray[np.float32] | None:
        """Kullback-Leibler divergence (positions,) of the next token's distribution from the exact
        model's, in nats, of a run with a method in the loop; None for other traces."""
        if "kl" not in self._group:
            return None
        place = (sequence, slice(self.length(sequence)))
        return self.read(self._small("kl"), place, f"kl of sequence {sequence}")

    def query_positions(self, sequence: int) -> npt.NDArray[np.int32]:
        """Positions (queries,) of the queries that were kept, ascending."""
        stored = self._query_positions[sequence]
        return np.asarray(stored[stored >= 0])

    def phase(self, sequence: int) -> npt.NDArray[np.int8]:
        """What each position is (positions,), as a code in `PHASES`."""
        if "phase" not in self._group:  # made before there was such an array
            return np.zeros(self.length(sequence), np.int8)
        return np.asarray(self._small("phase")[sequence, : self.length(sequence)])

    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood over all finished sequences."""
        values = np.concatenate([self.nll(s) for s in self.sequences] or [np.empty(0, np.float32)])
        values = values[~np.isnan(values)].astype(np.float64)
        return float(np.exp(values.mean())) if values.size else float("nan")

    def nbytes(self) -> int:
        """Bytes of the tensors of the finished sequences, padding excluded."""
        per_position = sum(r.kv_heads * (r.key_dim + r.value_dim) for r in self._rules)
        per_query = sum(r.heads * r.key_dim for r in self._rules)
        elements = sum(
            self.length(s) * per_position + len(self.query_positions(s)) * per_query
            for s in self.sequences
        )
        return elements * self.dtype.itemsize

    def digest(self, sequence: int) -> str:
        """Names what was recorded of a sequence: 32 hex digits that change with the model's
        weights, the text or the rules of capture (through tokens, likelihoods and attributes)."""
        known = hashlib.sha256()
        capture = {k: v for k, v in self.attributes.items() if k not in ("command", "created")}
        rules = [rules.to_attributes() for rules in self._rules]
        known.update(json.dumps([capture, rules, sequence], sort_keys=True).encode())
        for array in (self.tokens(sequence), self.query_positions(sequence), self.nll(sequence)):
            known.update(np.ascontiguousarray(array).tobytes())
        phase = self.phase(sequence)
        if phase.any():  # names what it did before there were phases, where all is context
            known.update(phase.tobytes())
        return known.hexdigest()[:32]

    def read(self, array: "zarr.Array[Any]", place: Any, what: str) -> npt.NDArray[Any]:
        """A part of one of the trace's arrays, named in the error if it is damaged."""
        try:
            return np.asarray(array[place])
        except (ValueError, RuntimeError) as error:  # a checksum that does not match
            raise RetraceError(
                f"{self.path}: {what} is damaged ({error}). Capture it again with --overwrite."
            ) from error

    @cached_property
    def _rules(self) -> tuple[LayerRules, ...]:
        """Of every layer: read once, since a digest is asked for again with each of them."""
        return tuple(self.layer(index).rules for index in self.layers)

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int32]:
        return self.read(self._small("length"), slice(None), "length")

    @cached_property
    def _query_positions(self) -> npt.NDArray[np.int32]:
        return self.read(self._small("query_positions"), slice(None), "query_positions")

    def _small(self, name: str) -> "zarr.Array[Any]":
        array = self._group[name]
        assert isinstance(array, zarr.Array)
        return array

    def __reduce__(self) -> tuple[Any, ...]:
        path = self.path.absolute() if isinstance(self.path, Path) else self.path
        return _opened_before, (path, self.attributes.get("created"), self.sequences)

    def __repr__(self) -> str:
        return (
            f"Trace({str(self.path)!r}, layers={len(self.layers)}, "
            f"sequences={len(self.sequences)}/{self.planned}, dtype={self.attributes['dtype']})"
        )


def open_trace(path: str | Location) -> Trace:
    """Open a trace for reading; sequences that are not finished are left out.

    Raises:
        RetraceError: there is nothing at `path`, it is no trace, or its format is newer.
    """
    path = locate(path)
    if not path.exists():
        raise RetraceError(f"There is no trace at {path}. `retrace traces` lists those here.")
    group = _open_group(path)
    attributes: Mapping[str, Any] = dict(group.attrs)
    if _half_begun(attributes):
        raise RetraceError(
            f"{path} was being created when its capture ended: give the same capture again."
        )
    version = attributes.get(FORMAT_KEY)
    if not isinstance(version, int):
        raise RetraceError(f"{path} is a Zarr group but no trace: it has no {FORMAT_KEY!r}.")
    if version > FORMAT_VERSION:
        raise RetraceError(
            f"{path} has trace format {version}, this retrace reads up to {FORMAT_VERSION}: "
            "update it with `pip install -U retrace-attention`."
        )
    if attributes.get("dtype") not in DTYPES:
        raise RetraceError(f"{path}: unknown dtype {attributes.get('dtype')!r}.")
    return Trace(path, group)


@lru_cache(maxsize=8)
def _opened_before(path: Location, created: str | None, sequences: tuple[int, ...]) -> Trace:
    """The trace at `path`, once for all that is asked of it; a newer one is another."""
    trace = open_trace(path)
    trace.sequences = sequences  # those that were finished then
    return trace


def half_begun(path: Location) -> bool:
    """Whether a capture ended while it was creating the trace at `path`, which holds nothing yet.

    Only under a URL: on a local disk a trace is created aside and renamed.
    """
    return path.exists() and _half_begun(dict(_open_group(path).attrs))


def _half_begun(attributes: Mapping[str, Any]) -> bool:
    return FORMAT_KEY in attributes and attributes[FORMAT_KEY] is None


def _open_group(path: Location) -> zarr.Group:
    try:
        # Not the consolidated metadata: it is written once, when a capture is complete.
        store = open_store(path, read_only=True)
        return zarr.open_group(store, mode="r", use_consolidated=False)
    except (OSError, ValueError, KeyError) as error:
        raise RetraceError(f"{path} is not a trace: it is no Zarr group.") from error


def find_traces(folder: str | Location) -> list[Location]:
    """The traces directly in `folder` or in its sub-folder `traces`, the newest last; those under
    a URL by name."""
    folder = locate(folder)
    if isinstance(folder, RemoteLocation):
        return [place for place in folder.traces() if _is_trace(place)]
    found = [
        path
        for place in (folder, folder / "traces")
        for path in place.glob("*.zarr")
        if _is_trace(path)
    ]
    # The flags of finished sequences are the last thing that a capture writes.
    found.sort(key=lambda path: (_last_change(path / "done"), str(path)))
    return [*found]


def _is_trace(path: Location) -> bool:
    try:
        open_trace(path)
    except RetraceError:
        return False
    return True


def _last_change(folder: Path) -> float:
    return max((p.stat().st_mtime for p in folder.rglob("*")), default=0.0)


def _ranges(indices: tuple[int, ...]) -> str:
    if indices and indices == tuple(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]} to {indices[-1]}"
    return ", ".join(map(str, indices))
