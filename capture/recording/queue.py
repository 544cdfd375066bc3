"""Between the forward pass and the disk: tensors are copied and written while the model goes on."""

import threading
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrace.traces import RetraceError, TraceWriter, to_numpy

Figures = npt.NDArray[np.float32]
"""One number per position."""
QUEUE_BYTES = 1 << 30
"""Host memory of what waits to be written: several layers of a model with 8 billion parameters at
8,192 tokens, and four of the largest shards. More would only delay the wait for a slower disk."""
WRITERS = 4
"""Threads that write. Flushing a file waits for the disk, which takes several at once; two cores'
worth of checksums and copies keep the fastest disks busy."""


@dataclass(frozen=True)
class _Copy:
    """A copy on the host of what one sequence has in a shard."""

    tensor: npt.NDArray[Any]
    """(heads, positions, channels)."""
    extremes: Tensor
    """Least and greatest element (2,), on the host; NaN where there is one."""
    copied: torch.cuda.Event | None
    """After this the copy is complete; None where it is already."""


@dataclass(frozen=True)
class _Shard:
    """What one shard holds, as far as it was given."""

    bundle: range
    layer: int
    name: str
    start: int
    copies: dict[int, _Copy] = field(default_factory=dict)
    """By sequence."""

    @property
    def whole(self) -> bool:
        """Whether all its sequences are there."""
        return len(self.copies) == len(self.bundle)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(copy.tensor.nbytes for copy in self.copies.values())


@dataclass
class _Bundle:
    """How far the sequences that share shards have come."""

    unwritten: int = 0
    """Shards that were begun and are not on the disk."""
    figures: dict[int, tuple[Figures, Figures | None]] = field(default_factory=dict)
    """Likelihoods and divergences of the sequences that were finished."""
    marking: bool = False
    """Whether a thread is marking it done."""


class WriteQueue:
    """A `LayerSink` that writes behind the model's back, in a bounded amount of memory.

    What it is given is copied to the host (on a stream of its own where it lies on a GPU) and
    written by a few threads, a shard each, as soon as all sequences of the shard's bundle are
    there. When the disk is slower than the model, the model waits for room. The sequences of a
    bundle are marked done when all of it is on the disk. Used as a context: leaving it waits for
    everything, or after an error for what is being written at that moment, and ends the threads.
    What goes wrong in a thread is raised by the next call.
    """

    def __init__(self, writer: TraceWriter, capacity: int = QUEUE_BYTES) -> None:
        self._writer = writer
        self._capacity = capacity
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # Everything below is guarded by the condition, which tells of every change.
        self._changed = threading.Condition()
        self._begun: dict[tuple[int, int, str, int], _Shard] = {}
        self._waiting: deque[_Shard] = deque()
        self._held = 0
        self._held_for_more = 0
        """Of the memory that is held, what no write frees: that of shards that are not whole."""
        self._bundles: dict[range, _Bundle] = {}
        self._done: set[int] = set()
        self._error: BaseException | None = None
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"retrace-writer-{i}") for i in range(WRITERS)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.drain()
        finally:
            with self._changed:
                self._closing = True
                self._waiting.clear()
                self._changed.notify_all()
            for thread in self._threads:
                thread.join()

    def write_layer(self, sequence: int, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Take one layer's tensors of one sequence, by name; returns before they are written.

        Shapes: query (heads, queries, channels), key (kv_heads, positions, channels),
        value (kv_heads, positions, value channels), selected (choices, queries, kept), on any
        device.
        """
        for name, tensor in tensors.items():
            length = self._writer.shard_length(layer, name)
            for start in range(0, tensor.shape[1], length):
                part = tensor[:, start : start + length]
                self._wait_for_room(part.nbytes)
                self._add(sequence, layer, name, start, self._copy(part))

    def finish_sequence(
        self,
        sequence: int,
        nll: Figures,
        kl: Figures | None = None,
    ) -> None:
        """Mark the sequence done, with its likelihoods and divergences (positions,), once all of
        its bundle is finished and written."""
        with self._changed:
            self._raise()
            self._bundle_of(sequence).figures[sequence] = nll, kl
            self._changed.notify_all()

    def wait_for(self, sequences: Collection[int]) -> None:
        """Wait until these sequences, all of which were finished, are marked done."""
        self._wait(lambda: self._done.issuperset(sequences))

    def drain(self) -> None:
        """Wait until all shards that are whole are written, and the bundles so finished marked."""
        self._wait(
            lambda: (
                self._held == self._held_for_more
                and not any(self._is_finished(bundle) for bundle in self._bundles)
            )
        )

    def _wait(self, condition: Any) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or condition())
            self._raise()

    def _wait_for_room(self, size: int) -> None:
        """Reserve memory; what finds none that a write would free is let in."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._error is not None
                    or self._held == self._held_for_more
                    or self._held + size <= self._capacity
                )
            )
            self._raise()
            self._held += size

    def _add(self, sequence: int, layer: int, name: str, start: int, copy: _Copy) -> None:
        """Put a copy in its shard, which is to be written when it is whole."""
        bundle = self._writer.bundle_of(sequence)
        place = (bundle.start, layer, name, start)
        with self._changed:
            if place not in self._begun:
                self._begun[place] = _Shard(bundle, layer, name, start)
                self._bundle_of(sequence).unwritten += 1
            shard = self._begun[place]
            shard.copies[sequence] = copy
            self._held_for_more += copy.tensor.nbytes
            if shard.whole:
                self._waiting.append(self._begun.pop(place))
                self._held_for_more -= shard.nbytes
            self._changed.notify_all()

    def _bundle_of(self, sequence: int) -> _Bundle:
        return self._bundles.setdefault(self._writer.bundle_of(sequence), _Bundle())

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _is_finished(self, bundle: range) -> bool:
        known = self._bundles[bundle]
        return known.unwritten == 0 and len(known.figures) == len(bundle)

    def _copy(self, tensor: Tensor) -> _Copy:
        """A contiguous copy on the host; on a GPU it is only begun."""
        if tensor.device.type != "cuda":
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            extremes = torch.stack(tensor.aminmax()).double()
            return _Copy(to_numpy(tensor), extremes, None)
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        bounds = torch.empty(2, dtype=torch.float64, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            # The memory is not to be given to others by the stream that computes meanwhile.
            tensor.record_stream(stream)
            host.copy_(tensor, non_blocking=True)
            bounds.copy_(torch.stack(tensor.aminmax()).double(), non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(stream)
        return _Copy(to_numpy(host), bounds, copied)

    def _work(self) -> None:
        """What each thread does until the queue is closed or something goes wrong."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        self._closing
                        or self._error is not None
                        or bool(self._waiting)
                        or self._to_mark() is not None
                    )
                )
                if self._closing or self._error is not None:
                    return
                finished = self._to_mark()
                shard = None
                if finished is None:
                    shard = self._waiting.popleft()
                else:
                    self._bundles[finished].marking = True
            try:
                if shard is not None:
                    self._write(shard)
                elif finished is not None:
                    self._mark(finished)
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            with self._changed:
                if shard is not None:
                    self._held -= shard.nbytes
                    self._bundles[shard.bundle].unwritten -= 1
                elif finished is not None:
                    del self._bundles[finished]
                    self._done.update(finished)
                self._changed.notify_all()
            del shard  # its memory is no longer counted

    def _to_mark(self) -> range | None:
        """A bundle all of which is written, and which no thread is marking yet."""
        found = (b for b, known in self._bundles.items() if not known.marking)
        return next(filter(self._is_finished, found), None)

    def _mark(self, bundle: range) -> None:
        figures = [self._bundles[bundle].figures[sequence] for sequence in bundle]
        kl = [divergences for _, divergences in figures if divergences is not None]
        self._writer.finish_bundle(bundle, [nll for nll, _ in figures], kl or None)

    def _write(self, shard: _Shard) -> None:
        copies = [shard.copies[sequence] for sequence in shard.bundle]
        for sequence, copy in zip(shard.bundle, copies, strict=True):
            if copy.copied is not None:
                copy.copied.synchronize()
            if not bool(torch.isfinite(copy.extremes).all()):
                names = {"query": "queries", "key": "keys", "value": "values"}
                raise RetraceError(
                    f"Layer {shard.layer} has {names[shard.name]} that are not finite in sequence "
                    f"{sequence}: try another --dtype."
                )
        tensors = [copy.tensor for copy in copies]
        self._writer.write_shard(shard.bundle, shard.layer, shard.name, shard.start, tensors)
