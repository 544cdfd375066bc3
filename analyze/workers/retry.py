"""Calls that any executor runs: again where a worker died or a disk was away for a moment."""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future
from queue import SimpleQueue
from typing import TypeVar

import torch

from retrace.traces import RetraceError

log = logging.getLogger("retrace")

K = TypeVar("K")
T = TypeVar("T")

ATTEMPTS = 3


def finished(
    pool: Executor, calls: Mapping[K, Callable[[], T]]
) -> Iterator[tuple[K, T | BrokenExecutor]]:
    """What each call gives, as they finish. One that ends its worker time after time gives the
    last error.

    Raises:
        Exception: what a call raised: at once if the user can mend it, else at its last attempt.
    """
    attempts: Counter[K] = Counter()
    running: dict[Future[T], K] = {}
    # Each future comes here by itself: to wait for any of them looks at all of them each time.
    done: SimpleQueue[Future[T]] = SimpleQueue()

    def submit(key: K) -> None:
        future = pool.submit(_alone, calls[key])
        running[future] = key
        future.add_done_callback(done.put)

    try:
        for key in calls:
            submit(key)
        while running:
            future = done.get()
            key = running.pop(future)
            attempts[key] += 1
            try:
                answer: T | BrokenExecutor = future.result()
            except RetraceError:
                raise
            except Exception as error:
                death = _death(error, attempts[key])
                if death is None and attempts[key] == ATTEMPTS:
                    raise
                if death is None:
                    submit(key)
                    continue
                answer = death
            yield key, answer
    finally:
        for future in running:
            future.cancel()


def name_missing(layer: int, sequence: int, death: BrokenExecutor) -> None:
    """Warn that a layer of a sequence is missing, since its workers ended time after time."""
    log.warning(
        "Layer %d of sequence %d is missing: %s. If that is for want of memory, fewer --workers "
        "take less.",
        layer,
        sequence,
        death,
    )


def none_left(deaths: Iterable[str]) -> RetraceError:
    """The error where all are missing."""
    return RetraceError(f"Nothing could be replayed: {', '.join(sorted(set(deaths)))}.")


def _death(error: Exception, attempts: int) -> BrokenExecutor | None:
    """What is said of a call that ended its workers, once it was tried often enough."""
    dask = sys.modules.get("distributed")
    if dask is not None and isinstance(error, dask.KilledWorker):  # after trying it by itself
        count = error.allowed_failures + 1
        return BrokenExecutor(f"{count} workers of the Dask cluster died of it")
    if isinstance(error, BrokenExecutor) and attempts == ATTEMPTS:
        return BrokenExecutor(f"{error}, {attempts} times")
    return None


def _alone(call: Callable[[], T]) -> T:
    """Its sums in one thread, as everywhere: in several they differ in their last bits."""
    torch.set_num_threads(1)
    return call()
