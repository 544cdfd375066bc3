"""Copying a trace, or a slice of it, to another place."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrace.traces.bundles import bundle_size, bundles_of
from retrace.traces.errors import DamageError, RetraceError
from retrace.traces.location import Location, locate
from retrace.traces.output import Output
from retrace.traces.progress import ShowDone
from retrace.traces.queries import parse_queries
from retrace.traces.reader import Layer, Trace, open_trace
from retrace.traces.schema import (
    DTYPES,
    FORMAT_KEY,
    OUTPUT_PROJECTION,
    PHASES,
    TENSOR_AXES,
    OutputProjection,
)
from retrace.traces.storage.lock import locked
from retrace.traces.writer import TraceWriter, create_trace, resume_trace, tensor_bytes

THREADS = 4
"""Tensors that are read and written at once."""
COPIED = "copied"
"""The attribute that says what a trace is a copy of: a list, of which the last entry is the newest
copy, each with `trace`, `layers`, `sequences` (their numbers there, in the order that they have
here) and `queries`."""


def copy_trace(
    trace: Trace | str | Path,
    out: str | Path,
    *,
    layers: Sequence[int] | None = None,
    sequences: Sequence[int] | None = None,
    queries: str = "all",
    overwrite: bool = False,
    resume: bool = False,
    progress: ShowDone | None = None,
) -> Trace:
    """Copy a trace, or some layers, sequences and queries of it, to another place: each a path or a
    URL.

    Layers keep their numbers; sequences are numbered anew, from 0 on, in ascending order. All that
    is known of them goes along: tokens, likelihoods, phases, marks, rules and output projections,
    and what the capture noted. The attribute `copied` says what it is a copy of. Every checksum is
    tried on the way. Under the same settings an analysis of the copy comes to the figures of the
    same layers and sequences of the original, but for methods that draw random numbers, which do so
    by the sequence's number.

    Args:
        trace: what to copy.
        out: where to; a finished copy takes the place of what is there only when it is complete, or
            under a URL, where nothing can be renamed, from its beginning.
        layers: indices of those to copy; all recorded ones by default.
        sequences: numbers of those to copy; all finished ones by default.
        queries: which to keep of those that there are: `all`, `last:N` or `stride:N`, as a capture
            has it, with the last 64 of the prompt.
        overwrite: whether to replace the trace at `out`.
        resume: whether to go on with a copy that was interrupted.
        progress: told how many layers of sequences are copied.

    Returns:
        The copy.

    Raises:
        RetraceError: what is asked for is not there, or something else is at `out`.
        DamageError: something of the original is damaged.
    """
    source = trace if isinstance(trace, Trace) else open_trace(trace)
    place = locate(out)
    if overwrite and resume:
        raise RetraceError("overwrite and resume contradict each other: give one of them.")
    if _same(source.path, place):
        raise RetraceError(f"{place} is the trace itself: name another place for its copy.")
    with locked(place, "Another capture or copy"):
        output = Output(place, overwrite=overwrite, resume=resume)
        copy = _Copy(source, layers, sequences, queries)
        if not output.resumes:
            output.clear()
            output.check_space(copy.bytes())
        writer = copy.open(output)
        try:
            done = set(open_trace(output.writing).sequences)
            copy.write(writer, done, progress or (lambda done, total: None))
        except DamageError:
            if not output.resumes and not open_trace(output.writing).sequences:
                output.discard()
            raise
        writer.close()
        output.complete()
    return open_trace(place)


class _Copy:
    """What is copied of a trace, settled before anything is written."""

    def __init__(
        self,
        source: Trace,
        layers: Sequence[int] | None,
        sequences: Sequence[int] | None,
        queries: str,
    ) -> None:
        self.source = source
        self.sequences = _chosen_sequences(source, sequences)
        chosen = source.layers if layers is None else tuple(sorted(set(layers)))
        if not chosen:
            raise RetraceError("No layer is to be copied: name one.")
        self.layers = {index: source.layer(index) for index in chosen}
        self._phases = [source.phase(sequence) for sequence in self.sequences]
        self._kept = self._chosen_queries(queries)
        self._plan: dict[str, Any] = {
            "rules": {index: layer.rules for index, layer in self.layers.items()},
            "tokens": [source.tokens(sequence) for sequence in self.sequences],
            "query_positions": self._kept,
            "dtype": source.attributes["dtype"],
        }
        self._attributes = {
            name: value
            for name, value in source.attributes.items()
            if name not in (FORMAT_KEY, "dtype", COPIED)
        }
        self._queries = queries

    def _copied(self) -> list[Any]:
        """What the copy is of, and what that was of."""
        before = self.source.attributes.get(COPIED)
        now = {
            "trace": str(self.source.path),
            "layers": list(self.layers),
            "sequences": list(self.sequences),
            "queries": self._queries,
        }
        return [*(before if isinstance(before, list) else []), now]

    def bytes(self) -> int:
        """Bytes of its tensors and output projections."""
        projections = (layer.projection_array() for layer in self.layers.values())
        held = sum(int(np.prod(array.shape)) for array in projections if array is not None)
        return tensor_bytes(**self._plan) + held * DTYPES[self._plan["dtype"]].itemsize

    def open(self, output: Output) -> TraceWriter:
        """Begin the copy, or go on with it."""
        beside: dict[str, Any] = {
            "phases": self._phases,
            "marks": [self.source.marks(sequence) for sequence in self.sequences],
        }
        if output.resumes:
            return resume_trace(output.writing, **self._plan, **beside, attributes=self._attributes)
        count, positions = len(self.sequences), max(map(len, self._plan["tokens"]))
        return create_trace(
            output.writing,
            **self._plan,
            **beside,
            attributes=self._attributes | {COPIED: self._copied()},
            projections={index: p for index in self.layers if (p := self._projection(index))},
            diverges=self.source.has("kl"),
            bundle=bundle_size(count, positions, tensor_bytes(**self._plan) // count),
        )

    def write(self, writer: TraceWriter, done: set[int], progress: ShowDone) -> None:
        """Copy what is not `done`, bundle by bundle."""
        count = len(self.sequences)
        total, finished = count * len(self.layers), len(done) * len(self.layers)
        progress(finished, total)
        size = len(writer.bundle_of(0))
        with ThreadPoolExecutor(THREADS, thread_name_prefix="retrace-copy") as pool:
            try:
                for bundle in bundles_of(count, size):
                    if done.issuperset(bundle):
                        continue
                    for index in self.layers:
                        names = list(self.layers[index].shapes)
                        list(pool.map(self._copying(writer, bundle, index), names))
                        finished += len(bundle)
                        progress(finished, total)
                    numbers = [self.sequences[sequence] for sequence in bundle]
                    nll = [self.source.nll(number) for number in numbers]
                    kl = [k for number in numbers if (k := self.source.kl(number)) is not None]
                    writer.finish_bundle(bundle, nll, kl or None)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _copying(self, writer: TraceWriter, bundle: range, index: int) -> Callable[[str], None]:
        def copy(name: str) -> None:
            parts = [self._tensor(self.layers[index], name, sequence) for sequence in bundle]
            length = writer.shard_length(index, name)
            for start in range(0, max(part.shape[1] for part in parts), length):
                shard = [part[:, start : start + length] for part in parts]
                writer.write_shard(bundle, index, name, start, shard)

        return copy

    def _tensor(self, layer: Layer, name: str, sequence: int) -> npt.NDArray[Any]:
        """What the copy holds of a layer's array (heads, positions, channels)."""
        number = self.sequences[sequence]
        tensor: npt.NDArray[Any] = getattr(layer, name)(number)
        if "query_position" not in TENSOR_AXES[name]:
            return tensor
        there = self.source.query_positions(number)
        return tensor[:, np.searchsorted(there, self._kept[sequence])]

    def _projection(self, index: int) -> OutputProjection | str | None:
        layer = self.layers[index]
        array = layer.projection_array()
        if array is None:
            why = layer.attributes.get(f"no_{OUTPUT_PROJECTION}")
            return why if isinstance(why, str) else None
        return OutputProjection(layer.attributes[OUTPUT_PROJECTION], array.shape[0], array.read)

    def _chosen_queries(self, queries: str) -> list[npt.NDArray[np.int32]]:
        select, kept = parse_queries(queries), []
        for sequence, phase in zip(self.sequences, self._phases, strict=True):
            there = self.source.query_positions(sequence)
            prompt = int((phase == PHASES["context"]).sum())
            chosen = np.intersect1d(there, select.positions(len(phase), prompt))
            if not len(chosen):
                raise RetraceError(
                    f"{self.source.path} keeps no query of {queries} in sequence {sequence}: take "
                    "others with --queries."
                )
            kept.append(chosen.astype(np.int32))
        return kept


def _chosen_sequences(trace: Trace, sequences: Sequence[int] | None) -> tuple[int, ...]:
    if sequences is None:
        chosen = trace.sequences
    else:
        chosen = tuple(sorted(set(sequences)))
        missing = [str(s) for s in chosen if s not in trace.sequences]
        if missing:
            raise RetraceError(
                f"{trace.path} has no finished sequence {', '.join(missing)}: it has "
                f"{len(trace.sequences)}; `retrace info` says more."
            )
    if not chosen:
        raise RetraceError(f"{trace.path} has no finished sequence that could be copied.")
    return chosen


def _same(one: Location, other: Location) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return one.resolve() == other.resolve()
    return one == other
