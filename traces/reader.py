"""Reading a trace: its plan, its finished sequences and their tensors, as NumPy arrays."""

import hashlib
import html
import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrace.traces.errors import DamageError, RetraceError
from retrace.traces.location import Location, RemoteLocation, locate, on_hub
from retrace.traces.numbers import bad_score, bad_vector
from retrace.traces.rotation import Rotation
from retrace.traces.schema import (
    DTYPES,
    FORMAT_KEY,
    FORMAT_VERSION,
    OUTPUT_PROJECTION,
    LayerRules,
    layer_bytes,
    tensor_dtype,
    tensor_shapes,
)
from retrace.traces.sequences import SequenceArrays
from retrace.traces.storage.arrays import Stored, Tensors, Whole
from retrace.traces.storage.objects import open_objects


class Layer:
    """One recorded attention layer: its rules, and its tensors sequence by sequence.

    Whatever reads tensors raises `DamageError` where they are not as they were written.
    """

    def __init__(
        self, index: int, rules: LayerRules, attributes: Mapping[str, Any], trace: "Trace"
    ) -> None:
        self.index = index
        self.rules = rules
        self.attributes = attributes
        """All that its group says, its rules included."""
        self.trace = trace
        """The trace that it is a layer of."""
        self._arrays: dict[str, Tensors] = {}  # each costs a read

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

    def selected(self, sequence: int, choices: slice = slice(None)) -> npt.NDArray[np.int32]:
        """Keys that a natively sparse model chose for each query: ids (choices, queries, kept), -1
        where there are fewer, at the end; one choice for all heads, or one for each kv head.

        Raises:
            RetraceError: the layer chooses none: it attends to all that it sees.
        """
        if self.rules.indexer is None:
            raise RetraceError(
                f"Layer {self.index} ({self.rules.module}) attends to all keys that it sees."
            )
        positions = self.query_positions(sequence)
        ids = self._read("selected", sequence, choices, len(positions))
        if bool(((ids < -1) | (ids > positions[:, None])).any()):
            raise self.tensors("selected").damage("it names keys that are not there", sequence)
        return ids

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Its arrays by name: their extents besides the sequences."""
        return tensor_shapes(self.rules, self.trace.most_positions, self.trace.most_queries)

    def query_positions(self, sequence: int) -> npt.NDArray[np.int32]:
        """Positions (queries,) of the queries that were kept, ascending."""
        return self.trace.query_positions(sequence)

    @property
    def has_output_projection(self) -> bool:
        """Whether the trace holds the weights of its output projection; where not, its attribute
        `no_output_projection` may say why."""
        return isinstance(self.attributes.get(OUTPUT_PROJECTION), str)

    @property
    def output_projection(self) -> npt.NDArray[Any] | None:
        """The weights W_o (hidden, heads, value channels) that its attention output is multiplied
        with, in the trace's dtype and read anew each time; None where the trace holds none."""
        array = self.projection_array()
        return None if array is None else array.read()

    def projection_array(self) -> Whole | None:
        """The array of its output projection; None where the trace holds none.

        Raises:
            DamageError: its metadata are not those of one of this layer's rules.
        """
        if not self.has_output_projection:
            return None
        shape = (None, self.rules.heads, self.rules.value_dim)
        path = f"layers/{self.index}/{OUTPUT_PROJECTION}"
        return Whole(self.trace.stored, path, self.trace.dtype, shape)

    def check_vectors(
        self,
        name: str,
        sequence: int,
        vectors: npt.NDArray[Any],
        norms: npt.NDArray[Any],
        first_head: int = 0,
    ) -> None:
        """Refuse queries, keys or values (heads, positions, channels), from a head on, of which one
        is not finite or overflows float32, by the `norms_of` them (heads, positions).

        Raises:
            DamageError: names the first.
        """
        if (found := bad_vector(vectors, norms)) is not None:
            raise self._bad(name, sequence, found, first_head)

    def check_scores(
        self,
        sequence: int,
        query_norms: npt.NDArray[Any],
        key_norms: npt.NDArray[Any],
        first_head: int = 0,
    ) -> None:
        """Refuse queries, from a head on, whose scores may overflow float32, by norms of queries
        (heads, queries) and keys (kv_heads, positions).

        Raises:
            DamageError: names the first.
        """
        positions = self.query_positions(sequence)
        found = bad_score(query_norms, key_norms, positions, self.rules.scale)
        if found is not None:
            raise self._bad("query", sequence, found, first_head)

    def _bad(
        self, name: str, sequence: int, found: tuple[int, int, str], first_head: int
    ) -> DamageError:
        head, row, cause = found
        position = int(self.query_positions(sequence)[row]) if name == "query" else row
        place = f"{'head' if name == 'query' else 'kv head'} {first_head + head}"
        return self.tensors(name).damage(f"{cause} at {place}, position {position}", sequence)

    def _rotation(self) -> Rotation:
        if self.rules.rotation is None:
            raise RetraceError(
                f"The position encoding of layer {self.index} ({self.rules.module}) is not known, "
                "so that rotated=False cannot undo it: read it as attention saw it."
            )
        return self.rules.rotation

    def _read(self, name: str, sequence: int, heads: slice, length: int) -> npt.NDArray[Any]:
        return self.tensors(name).read(sequence, heads, length)

    def tensors(self, name: str) -> Tensors:
        """The array of all sequences' query, key, value or selected.

        Raises:
            DamageError: its metadata are not those of a trace's array of this layer's rules.
        """
        if name not in self._arrays:
            trace = self.trace
            shape = self.shapes[name]
            dtype = tensor_dtype(name, trace.attributes["dtype"])
            path = f"layers/{self.index}/{name}"
            self._arrays[name] = Tensors(trace.stored, path, dtype, (trace.planned, *shape))
        return self._arrays[name]


class Trace(SequenceArrays):
    """A captured trace: what was planned, what is finished, and the recorded layers.

    It is pickled as its place: another process opens it there.
    """

    def __init__(
        self,
        path: Location,
        stored: Stored,
        attributes: dict[str, Any],
        left_out: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(stored)
        self.path = path
        self.attributes = attributes
        self.left_out = dict(left_out or {})
        """Sequences that are passed over as though they were not finished, and why."""
        self._layers: dict[int, Layer] = {}  # opened once: each costs a read

    def without(self, sequences: Mapping[int, str]) -> "Trace":
        """The same trace less some sequences, by number with the reason."""
        return Trace(self.path, self.stored, self.attributes, {**self.left_out, **sequences})

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of queries, keys and values."""
        return DTYPES[self.attributes["dtype"]]

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Indices of the recorded layers, ascending."""
        try:
            names = self.stored.objects.children("layers")
        except OSError as error:
            raise self.stored.damage("layers", f"cannot be read: {error.strerror}") from error
        return tuple(sorted(int(n) for n in names if n.isdecimal() and n == str(int(n))))

    def layer(self, index: int) -> Layer:
        """The recorded layer of this index; refuses one that was not recorded."""
        if index not in self.layers:
            raise RetraceError(f"{self.path} has no layer {index}; it has {_ranges(self.layers)}.")
        if index not in self._layers:
            name = f"layers/{index}"
            attributes = self.stored.attributes(name)
            if attributes is None:
                raise self.stored.damage(name, "its zarr.json is missing")
            try:
                rules = LayerRules.from_attributes(attributes)
            except RetraceError as error:
                raise self.stored.damage(name, str(error).rstrip(".")) from error
            self._layers[index] = Layer(index, rules, attributes, self)
        return self._layers[index]

    @cached_property
    def sequences(self) -> tuple[int, ...]:
        """The sequences that are completely written; only these can be read."""
        planned = range(self.planned)
        return tuple(s for s in planned if s not in self.left_out and self.finished(s))

    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood over all finished sequences."""
        values = np.concatenate([self.nll(s) for s in self.sequences] or [np.empty(0, np.float32)])
        values = values[~np.isnan(values)].astype(np.float64)
        return float(np.exp(values.mean())) if values.size else float("nan")

    def nbytes(self) -> int:
        """Bytes of the tensors of the finished sequences, padding excluded."""
        return sum(
            layer_bytes(
                rules, self.length(s), len(self.query_positions(s)), self.attributes["dtype"]
            )
            for s in self.sequences
            for rules in self._rules
        )

    @property
    def natively_sparse(self) -> bool:
        """Whether the model itself chooses, in some recorded layer, which keys it attends to."""
        return any(rules.indexer is not None for rules in self._rules)

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
        for name, spans in self.marks(sequence).items():
            known.update(f"{name} {spans}".encode())
        return known.hexdigest()[:32]

    def check_arrays(self) -> None:
        """Refuse a trace of which some array's metadata is not as its rules and plan say."""
        for index in self.layers:
            for name in self.layer(index).shapes:
                self.check_tensors(index, name)
        self.check_small_arrays()

    def check_tensors(self, layer: int, name: str) -> None:
        """Refuse a layer's array whose metadata is not as rules and plan say."""
        self._check_bundle(self.layer(layer).tensors(name))

    @cached_property
    def _rules(self) -> tuple[LayerRules, ...]:
        """Of every layer: read once, since a digest is asked for again with each of them."""
        return tuple(self.layer(index).rules for index in self.layers)

    def __reduce__(self) -> tuple[Any, ...]:
        path = self.path.absolute() if isinstance(self.path, Path) else self.path
        left_out = tuple(self.left_out.items())
        return _opened_before, (path, self.attributes.get("created"), self.sequences, left_out)

    def _repr_html_(self) -> str:
        """A table, where a notebook shows it."""
        model, done = self.attributes.get("model"), self.sequences
        facts = {
            "Trace": self.path,
            "Model": model.get("pretrained") if isinstance(model, dict) else model,
            "Sequences": f"{len(done)} of {self.planned}",
            "Tokens": f"{sum(map(self.length, done)):,}",
            "Layers": _ranges(self.layers),
            "Dtype": self.attributes["dtype"],
        }
        rows = (f"<tr><th>{k}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
        return f"<table>{''.join(rows)}</table>"

    def __repr__(self) -> str:
        return (
            f"Trace({str(self.path)!r}, layers={len(self.layers)}, "
            f"sequences={len(self.sequences)}/{self.planned}, dtype={self.attributes['dtype']})"
        )


def open_trace(path: str | Location) -> Trace:
    """Open a trace for reading; sequences that are not finished are left out.

    Raises:
        RetraceError: there is nothing at `path`, it is no trace, or its format is newer.
        DamageError: its own metadata cannot be read.
    """
    path = locate(path)
    if not path.exists():
        # The Hub does not tell those who may not see a repository that it is there.
        hub = " A private data set needs `hf auth login` or HF_TOKEN." * on_hub(path)
        raise RetraceError(f"There is no trace at {path}. `retrace traces` lists those here.{hub}")
    stored = Stored(str(path), open_objects(path))
    attributes = _attributes(stored)
    if _half_begun(attributes):
        raise RetraceError(
            f"{path} was being created when its capture ended: give the same capture again."
        )
    version = attributes.get(FORMAT_KEY)
    if type(version) is not int:
        raise RetraceError(f"{path} is a Zarr group but no trace: it has no {FORMAT_KEY!r}.")
    if version > FORMAT_VERSION:
        raise RetraceError(
            f"{path} has trace format {version}, this retrace reads up to {FORMAT_VERSION}: "
            "update it with `pip install -U retrace-attention`."
        )
    dtype = attributes.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RetraceError(f"{path}: unknown dtype {dtype!r}.")
    return Trace(path, stored, attributes)


@lru_cache(maxsize=8)
def _opened_before(
    path: Location,
    created: str | None,
    sequences: tuple[int, ...],
    left_out: tuple[tuple[int, str], ...],
) -> Trace:
    """The trace at `path`, once for all that is asked of it; a newer one is another."""
    trace = open_trace(path).without(dict(left_out))
    trace.sequences = sequences  # those that were finished then
    return trace


def half_begun(path: Location) -> bool:
    """Whether a capture ended while it was creating the trace at `path`, which holds nothing yet.

    Only under a URL: on a local disk a trace is created aside and renamed.
    """
    return path.exists() and _half_begun(_attributes(Stored(str(path), open_objects(path))))


def _half_begun(attributes: Mapping[str, Any]) -> bool:
    return FORMAT_KEY in attributes and attributes[FORMAT_KEY] is None


def _attributes(stored: Stored) -> dict[str, Any]:
    """The attributes of the trace itself."""
    # Not the consolidated metadata: it is written once, when a capture is complete.
    attributes = stored.attributes("")
    if attributes is None:
        raise RetraceError(f"{stored.place} is not a trace: it is no Zarr group.")
    return attributes


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
