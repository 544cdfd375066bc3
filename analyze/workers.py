"""Threads that share the work on the layers and sequences of a trace."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def workers(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """One thread per core, each with arithmetic of one thread: the threads of one operation wait
    for each other, and on a machine that does other work besides, they wait long. One on a GPU."""
    threads, count = torch.get_num_threads(), worker_count(device)
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(
        count,
        thread_name_prefix="replay",
        initializer=lambda: torch.set_num_threads(1),
    )
    try:
        yield pool
    finally:
        # What has not begun is not wanted when one task failed.
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def worker_count(device: torch.device) -> int:
    """How many threads there are for work on a device."""
    return 1 if device.type == "cuda" else torch.get_num_threads()
