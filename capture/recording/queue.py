"""Between the forward pass and the disk: tensors are copied and written while the model goes on."""

import threading
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
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
class _Shard:
    """A copy on the host of what one shard holds."""

    sequence: int
    layer: int
    name: str
    start: int
    part: npt.NDArray[Any]
    """(heads, positions, channels)."""
    extremes: Tensor
    """Least and greatest element (2,), on the host; NaN where there is one."""
    copied: torch.cuda.Event | None
    """After this the copy is complete; None where it is already."""


class WriteQueue:
    """A `LayerSink` that writes behind the model's back, in a bounded amount of memory.

    What it is given is copied to the host (on a stream of its own where it lies on a GPU) and
    written by a few threads, a shard each. When the disk is slower than the model, the model waits
    for room. A sequence is marked done when all of it is on the disk. Used as a context: leaving it
    waits for everything, or after an error for what is being written at that moment, and ends the
    threads. What goes wrong in a thread is raised by the next call.
    """

    def __init__(self, writer: TraceWriter, capacity: int = QUEUE_BYTES) -> None:
        self._writer = writer
        self._capacity = capacity
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # Everything below is guarded by the condition, which tells of every change.
        self._changed = threading.Condition()
        self._waiting: deque[_Shard] = deque()
        self._held = 0
        self._unwritten: dict[int, int] = {}
        self._likelihoods: dict[int, tuple[Figures, Figures | None]] = {}
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

    def write_layer(
        self, sequence: int, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Take one layer's tensors of one sequence; returns before they are written.

        Shapes: query (heads, queries, channels), key (kv_heads, positions, channels),
        value (kv_heads, positions, value channels), on any device.
        """
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            length = self._writer.shard_length(layer, name)
            for start in range(0, tensor.shape[1], length):
                part = tensor[:, start : start + length]
                self._wait_for_room(sequence, part.nbytes)
                shard = self._copy(sequence, layer, name, start, part)
                with self._changed:
                    self._waiting.append(shard)
                    self._changed.notify_all()

    def finish_sequence(
        self,
        sequence: int,
        nll: Figures,
        kl: Figures | None = None,
    ) -> None:
        """Mark the sequence done, with its likelihoods and divergences (positions,), once all of it
        is written."""
        with self._changed:
            self._raise()
            self._likelihoods[sequence] = nll, kl
            self._unwritten.setdefault(sequence, 0)
            self._changed.notify_all()

    def wait_for(self, sequences: Collection[int]) -> None:
        """Wait until these sequences, all of which were finished, are marked done."""
        self._wait(lambda: self._done.issuperset(sequences))

    def drain(self) -> None:
        """Wait until everything that was given is written."""
        self._wait(lambda: not any(self._unwritten.values()) and not self._likelihoods)

    def _wait(self, condition: Any) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or condition())
            self._raise()

    def _wait_for_room(self, sequence: int, size: int) -> None:
        """Reserve memory; what is larger than all there is waits until it is alone."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._error is not None
                    or self._held == 0
                    or self._held + size <= self._capacity
                )
            )
            self._raise()
            self._held += size
            self._unwritten[sequence] = self._unwritten.get(sequence, 0) + 1

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _copy(self, sequence: int, layer: int, name: str, start: int, part: Tensor) -> _Shard:
        """A contiguous copy on the host; on a GPU it is only begun."""
        if part.device.type != "cuda":
            part = part.clone(memory_format=torch.contiguous_format)
            extremes = torch.stack(part.aminmax()).double()
            return _Shard(sequence, layer, name, start, to_numpy(part), extremes, None)
        stream = self._streams.get(part.device)
        if stream is None:
            stream = self._streams[part.device] = torch.cuda.Stream(part.device)  # type: ignore[no-untyped-call]
        host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        bounds = torch.empty(2, dtype=torch.float64, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(part.device))
        with torch.cuda.stream(stream):
            # The memory is not to be given to others by the stream that computes meanwhile.
            part.record_stream(stream)
            host.copy_(part, non_blocking=True)
            bounds.copy_(torch.stack(part.aminmax()).double(), non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(stream)
        return _Shard(sequence, layer, name, start, to_numpy(host), bounds, copied)

    def _work(self) -> None:
        """What each thread does until the queue is closed or something goes wrong."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        self._closing
                        or self._error is not None
                        or bool(self._waiting)
                        or self._complete() is not None
                    )
                )
                if self._closing or self._error is not None:
                    return
                finished = self._complete()
                shard = None
                if finished is None:
                    shard = self._waiting.popleft()
                else:
                    nll, kl = self._likelihoods[finished]
                    del self._unwritten[finished]
            try:
                if shard is not None:
                    self._write(shard)
                elif finished is not None:
                    self._writer.finish_sequence(finished, nll, kl)
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            with self._changed:
                if shard is not None:
                    self._held -= shard.part.nbytes
                    self._unwritten[shard.sequence] -= 1
                elif finished is not None:
                    del self._likelihoods[finished]
                    self._done.add(finished)
                self._changed.notify_all()
            del shard  # its memory is no longer counted

    def _complete(self) -> int | None:
        """A sequence all of which is written, and which no thread is marking yet."""
        found = (s for s in self._likelihoods if self._unwritten.get(s) == 0)
        return next(found, None)

    def _write(self, shard: _Shard) -> None:
        if shard.copied is not None:
            shard.copied.synchronize()
        if not bool(torch.isfinite(shard.extremes).all()):
            names = {"query": "queries", "key": "keys", "value": "values"}
            raise RetraceError(
                f"Layer {shard.layer} has {names[shard.name]} that are not finite in sequence "
                f"{shard.sequence}: try another --dtype."
            )
        self._writer.write_shard(shard.sequence, shard.layer, shard.name, shard.start, shard.part)
