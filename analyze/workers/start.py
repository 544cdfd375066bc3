"""Who does the work: threads of this process, or processes."""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from retrace.analyze.workers.dask import cluster
from retrace.analyze.workers.processes import Processes
from retrace.traces import RetraceError

BUSY_THREADS = 3
"""Cores that threads keep busy: more of them wait for Python's lock."""
WORTH_PROCESSES = 3e9
"""Scores, times methods, from which more processes than that are faster although they start late:
about a minute of one core."""
WORTH_GPUS = 1e12
"""The same from which further GPUs are worth a process each: they take about ten seconds to start,
and one GPU longer than that for so much."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Environment variable that names the GPUs that a process sees."""


@contextmanager
def threads(device: torch.device, count: int | None = None) -> Iterator[Executor]:
    """One thread per core, each with arithmetic of one thread: the threads of one operation wait
    for each other, and on a machine that does other work besides, they wait long. One on a GPU."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        count or worker_count(device, work=0.0),
        thread_name_prefix="replay",
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    try:
        yield pool
    finally:
        # What has not begun is not wanted when one task failed.
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


@contextmanager
def start_workers(
    device: torch.device, count: int | None, work: float, executor: Executor | str | None = None
) -> Iterator[tuple[Executor, int]]:
    """Workers for work of so many scores times methods, and how many they are: so many processes,
    or a thread if it is one. If no count is given it is `worker_count`'s, and threads on cores
    where those are as fast. Processes take the GPUs in turn, one each. An executor, or the Dask
    cluster of the scheduler at an address, comes in their place.
    """
    several = worker_count(device, work, count)
    as_fast = several <= BUSY_THREADS or work < WORTH_PROCESSES
    if isinstance(executor, str):
        with cluster(executor) as (pool, cores):
            yield pool, cores
    elif executor is not None:
        yield executor, several
    elif several == 1 or (count is None and as_fast and device.type != "cuda"):
        with threads(device, several) as pool:
            yield pool, several
    else:
        processes = Processes(several, gpu_environments(device))
        try:
            yield processes, several
        finally:
            processes.shutdown(cancel_futures=True)


def is_here(pool: Executor) -> bool:
    """Whether workers are threads of this process."""
    return type(pool) is ThreadPoolExecutor


def worker_count(device: torch.device, work: float, asked: int | None = None) -> int:
    """How many workers there are for work of so many scores times methods: as many as are asked
    for, or one per core; on GPUs one for each, or for one where the work is short."""
    if asked is not None:
        if asked < 1:
            raise RetraceError(f"{asked} workers: expected 1 or more.")
        return asked
    if device.type != "cuda":
        return torch.get_num_threads()
    return len(gpu_environments(device)) if work >= WORTH_GPUS else 1


def gpu_environments(device: torch.device) -> list[dict[str, str]]:
    """What processes that work on a device have in their environment besides, in turn: each sees
    one of the GPUs that this process sees, and calls it `cuda`. All see the same where the device
    is one GPU, such as `cuda:1`, or none."""
    if str(device) != "cuda":
        return [{}]
    count = torch.cuda.device_count()
    named = os.environ.get(VISIBLE)
    # Numbers or UUIDs, which end to count at the first that names no GPU.
    names = map(str, range(count)) if named is None else named.split(",")[:count]
    return [{VISIBLE: name.strip()} for name in names]
