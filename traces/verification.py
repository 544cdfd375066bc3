"""Reading all of a trace, to name everything in it that is not as it was written."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from retrace.traces.errors import DamageError
from retrace.traces.location import Location
from retrace.traces.numbers import norms_of
from retrace.traces.progress import ShowDone
from retrace.traces.reader import Trace, open_trace
from retrace.traces.schema import OUTPUT_PROJECTION, TENSOR_AXES

SMALL_ARRAYS = ("tokens", "length", "query_positions", "phase", "marks", "nll", "kl", "done")
READERS = 4
"""Threads that read, a layer of a sequence each."""


@dataclass
class Verification:
    """What is damaged in a trace, and what is whole."""

    trace: str
    damages: list[DamageError] = field(default_factory=list)
    """Everything that is damaged, ordered by layer and sequence."""
    planned: int = 0
    """Sequences that the capture set out to record."""
    finished: tuple[int, ...] = ()
    """Those that it recorded; of others nothing is expected, and nothing read."""
    layers: tuple[int, ...] = ()
    bytes: int = 0
    """Of the queries, keys, values and output projections that were read and are whole."""

    @property
    def whole(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages

    @property
    def whole_sequences(self) -> tuple[int, ...]:
        """The finished sequences of which everything in every layer is whole."""
        # Weights are of no sequence, and its tensors are read without them.
        damages = [damage for damage in self.damages if damage.tensor != OUTPUT_PROJECTION]
        if any(damage.sequence is None for damage in damages):
            return ()
        lost = {damage.sequence for damage in damages}
        return tuple(s for s in self.finished if s not in lost)

    @property
    def whole_layers(self) -> tuple[int, ...]:
        """The layers of which every finished sequence's tensors are whole."""
        if any(damage.layer is None and damage.sequence is None for damage in self.damages):
            return ()
        lost = {damage.layer for damage in self.damages}
        return tuple(layer for layer in self.layers if layer not in lost)

    def causes(self) -> dict[int, str]:
        """Why each finished sequence that is not whole is not."""
        whole = set(self.whole_sequences)
        return {
            sequence: "; ".join(
                f"{d.what}: {d.cause}" for d in self.damages if d.sequence in (None, sequence)
            )
            for sequence in self.finished
            if sequence not in whole
        }

    def facts(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return {
            "trace": self.trace,
            "whole": self.whole,
            "damaged": [
                {"layer": d.layer, "tensor": d.tensor, "sequence": d.sequence, "cause": d.cause}
                for d in self.damages
            ],
            "sequences": {
                "planned": self.planned,
                "finished": list(self.finished),
                "whole": list(self.whole_sequences),
            },
            "layers": {"recorded": list(self.layers), "whole": list(self.whole_layers)},
            "bytes": self.bytes,
        }


def verify_trace(
    trace: Trace | str | Location,
    *,
    layers: tuple[int, ...] | None = None,
    progress: ShowDone | None = None,
) -> Verification:
    """Read all of a trace and name what is damaged: what its checksum does not fit, what is cut
    short, missing, of another shape or dtype than the rules say, not finite or so large that it
    overflows float32, or unlike the rest.

    Args:
        trace: a trace or where it is.
        layers: those to read; all by default.
        progress: told how far it is.

    Raises:
        RetraceError: there is no trace, or one of a newer format.
    """
    found = Verification(str(trace.path if isinstance(trace, Trace) else trace))
    with _noted(found):
        trace = trace if isinstance(trace, Trace) else open_trace(trace)
        found.planned = trace.planned
        found.layers = trace.layers if layers is None else layers
        _check_metadata(trace, found)
        _check_projections(trace, found)
        found.finished = _finished(trace, found)
        _check_tensors(trace, found, progress)
    found.damages.sort(key=_order)
    return found


@contextmanager
def _noted(found: Verification) -> Iterator[None]:
    """Goes on after damage, which is noted once for each array and sequence."""
    try:
        yield
    except DamageError as error:
        if not any((d.array, d.sequence) == (error.array, error.sequence) for d in found.damages):
            found.damages.append(error)


def _order(damage: DamageError) -> tuple[int, int, int]:
    names = ["metadata", *TENSOR_AXES, OUTPUT_PROJECTION]
    return (
        -1 if damage.layer is None else damage.layer,
        -1 if damage.sequence is None else damage.sequence,
        names.index(damage.tensor) if damage.tensor in names else -1,
    )


def _check_metadata(trace: Trace, found: Verification) -> None:
    """Every array's and layer's metadata, against the rules, and against the copy that a finished
    capture leaves beside its attributes."""
    for index in found.layers:
        for name in TENSOR_AXES:
            with _noted(found):
                if name in trace.layer(index).shapes:
                    trace.check_tensors(index, name)
    with _noted(found):
        trace.check_small_arrays()
    consolidated = (trace.stored.metadata("") or {}).get("consolidated_metadata")
    copies = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    for name, copy in sorted(copies.items() if isinstance(copies, dict) else ()):
        with _noted(found):
            if not _is_wanted(name, found.layers, trace.layers) or not isinstance(copy, dict):
                continue
            metadata = trace.stored.metadata(name)
            if metadata is None:
                raise trace.stored.damage(name, "its zarr.json is missing")
            if _own(metadata) != _own(copy):
                cause = "its zarr.json is not what the finished capture noted of it"
                raise trace.stored.damage(name, cause)


def _is_wanted(name: str, layers: tuple[int, ...], there: tuple[int, ...]) -> bool:
    """Whether a name is that of an array or layer of a trace, and not of a layer left out."""
    first, _, rest = name.partition("/")
    layer, _, array = rest.partition("/")
    if first != "layers" or not layer:
        return first in SMALL_ARRAYS
    arrays = ("", *TENSOR_AXES, OUTPUT_PROJECTION)
    if not layer.isdecimal() or layer != str(int(layer)) or array not in arrays:
        return False
    return int(layer) in layers or int(layer) not in there


def _own(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata less those of what is beneath; as text, since NaN does not equal itself."""
    return {k: str(v) for k, v in metadata.items() if k != "consolidated_metadata"}


def _finished(trace: Trace, found: Verification) -> tuple[int, ...]:
    """The finished sequences, of which tokens, figures and positions are checked on the way."""
    finished = []
    for sequence in range(trace.planned):
        with _noted(found):
            if not trace.finished(sequence):
                continue
        finished.append(sequence)
        for read in (trace.length, trace.query_positions, trace.tokens, trace.phase, trace.marks):
            with _noted(found):
                read(sequence)
        with _noted(found):
            nll = trace.nll(sequence)
            partial = trace.attributes.get("likelihoods") == "partial"
            known = nll[:-1][~np.isnan(nll[:-1])] if partial else nll[:-1]
            if not np.isfinite(known).all():
                raise trace.stored.damage("nll", "not all of it is finite", sequence)
        with _noted(found):
            kl = trace.kl(sequence)
            if kl is not None and np.isinf(kl).any():
                raise trace.stored.damage("kl", "some of it is infinite", sequence)
    return tuple(finished)


def _check_projections(trace: Trace, found: Verification) -> None:
    for index in found.layers:
        with _noted(found):
            array = trace.layer(index).projection_array()
            if array is None:
                continue
            weights = array.read()
            if not np.isfinite(weights.astype(np.float32)).all():
                raise array.damage("not all of it is finite")
            found.bytes += weights.nbytes


def _check_tensors(trace: Trace, found: Verification, progress: ShowDone | None) -> None:
    tasks = [(layer, sequence) for layer in found.layers for sequence in found.finished]
    with ThreadPoolExecutor(READERS, thread_name_prefix="retrace-reader") as pool:
        try:
            if progress is not None:
                progress(0, len(tasks))
            checked = pool.map(lambda task: _check_layer(trace, *task), tasks)
            for done, (damages, size) in enumerate(checked, start=1):
                for damage in damages:
                    with _noted(found):
                        raise damage
                found.bytes += size
                if progress is not None:
                    progress(done, len(tasks))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_layer(trace: Trace, index: int, sequence: int) -> tuple[list[DamageError], int]:
    """What is damaged in a layer of a sequence, and the bytes of what is whole."""
    damages: list[DamageError] = []
    size = 0
    norms = {}
    for name in TENSOR_AXES:
        try:
            layer = trace.layer(index)
            if name not in layer.shapes:
                continue
            tensor: npt.NDArray[Any] = getattr(layer, name)(sequence)
            size += tensor.nbytes
            if name == "selected":
                continue
            norms[name] = norms_of(tensor)
            layer.check_vectors(name, sequence, tensor, norms[name])
        except DamageError as error:
            damages.append(error)
    if not damages:
        try:
            trace.layer(index).check_scores(sequence, norms["query"], norms["key"])
        except DamageError as error:
            damages.append(error)
    return damages, size
