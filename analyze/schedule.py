"""Calls that any executor runs: again where a worker died or a disk was away for a moment."""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, wait
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
    running = {pool.submit(_alone, call): key for key, call in calls.items()}
    try:
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                attempts[key] += 1
                try:
                    answer: T | BrokenExecutor = future.result()
                except RetraceError:
                    raise
                except Exception as error:
                    if attempts[key] < ATTEMPTS:
                        running[pool.submit(_alone, calls[key])] = key
                        continue
                    if not _is_death(error):
                        raise
                    answer = BrokenExecutor(str(error))
                yield key, answer
    finally:
        for future in running:
            future.cancel()


def name_missing(layer: int, sequence: int, death: BrokenExecutor) -> None:
    """Warn that a layer of a sequence is missing, since its workers ended time after time."""
    log.warning(
        "Layer %d of sequence %d is missing: %s, %d times. If that is for want of memory, "
        "fewer --workers take less.",
        layer,
        sequence,
        death,
        ATTEMPTS,
    )


def none_left(deaths: Iterable[str]) -> RetraceError:
    """The error where all are missing."""
    return RetraceError(f"Nothing could be replayed: {', '.join(sorted(set(deaths)))}.")


def _is_death(error: Exception) -> bool:
    """Whether a worker died, or as many as Dask allows."""
    killed = getattr(sys.modules.get("distributed"), "KilledWorker", BrokenExecutor)
    return isinstance(error, BrokenExecutor | killed)


def _alone(call: Callable[[], T]) -> T:
    """Its sums in one thread, as everywhere: in several they differ in their last bits."""
    torch.set_num_threads(1)
    return call()
