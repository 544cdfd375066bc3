"""What is lost of a run of `analyze` on a Dask cluster, part of which dies."""

import asyncio
import contextlib
import random
import shutil
import socket
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.faults import processes
from benchmarks.faults.analyze import Runs
from benchmarks.faults.capture import Captures
from benchmarks.faults.processes import Notes


def section(captures: Captures, count: int) -> list[str]:
    """Parts of a Dask cluster that die, so many times each at random moments."""
    runs, rng = Runs(captures.folder / "cluster-runs", captures.first), random.Random(4)
    faults = {
        "a worker killed every 4 units, and replaced": _worker_dies,
        "scheduler killed; the same command on another": _scheduler_dies,
        "scheduler killed; another at its address": _scheduler_returns,
        "client killed; the same command again": _client_dies,
    }
    return report({name: _trials(runs, count, rng, fault) for name, fault in faults.items()})


def serve(kind: str, place: tuple[str, ...], settings: dict[str, Any]) -> None:
    """A scheduler or worker, in a process of its own, until that ends."""
    import distributed

    async def server() -> None:
        async with getattr(distributed, kind)(*place, dashboard=False, **settings) as begun:
            await begun.finished()

    asyncio.run(server())


class Cluster:
    """A scheduler and two workers, a process each."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or _free_port()
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.scheduler = self._start(
            "Scheduler", host="127.0.0.1", port=self.port, dashboard_address=":0"
        )
        self.workers = [self._worker() for _ in range(2)]

    def kill_worker(self, index: int) -> None:
        """Kill a worker, and start another."""
        self.workers[index].kill()
        self.workers[index] = self._worker()

    def end(self) -> None:
        """End all of it."""
        for process in (self.scheduler, *self.workers):
            process.kill()

    def _worker(self) -> BaseProcess:
        return self._start("Worker", self.address, nthreads=1)

    def _start(self, kind: str, *place: str, **settings: Any) -> BaseProcess:
        return processes.begin(serve, kind, place, settings, daemon=True)


def _trials(runs: Runs, count: int, rng: random.Random, fault: Any) -> list[dict[str, Any]]:
    outcomes = []
    for index in range(count):
        place, cluster = runs.begin(f"cluster-{index}"), Cluster()
        try:
            after = rng.randrange(runs.units)
            found = fault(runs, place, cluster, after, rng)
        finally:
            cluster.end()
        same = (place / "r" / "metrics.parquet").read_bytes() == runs.whole
        outcomes.append({**found, "same": same})
        shutil.rmtree(place)
    return outcomes


def _worker_dies(
    runs: Runs, place: Path, cluster: Cluster, after: int, rng: random.Random
) -> dict[str, Any]:
    over, killed = threading.Event(), 0

    def kill() -> None:
        nonlocal killed
        while not over.wait(0.01):
            if runs.finished(place) >= 4 * killed:
                time.sleep(rng.random() / 5)
                cluster.kill_worker(rng.randrange(2))
                killed += 1

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        runs.run(place, executor=cluster.address)
    finally:
        over.set()
        killer.join()
    return {"reported": runs.units, "lost": 0, "killed": killed}


def _scheduler_dies(
    runs: Runs, place: Path, cluster: Cluster, after: int, rng: random.Random
) -> dict[str, Any]:
    noted = _with(runs, place, cluster, after, rng, cluster.scheduler.kill)
    other = Cluster()
    try:
        resumed = runs.run(place, executor=other.address)
    finally:
        other.end()
    return {**runs.counts(noted, resumed), "killed": 1}


def _scheduler_returns(
    runs: Runs, place: Path, cluster: Cluster, after: int, rng: random.Random
) -> dict[str, Any]:
    others = []

    def replace() -> None:
        cluster.scheduler.kill()
        cluster.scheduler.join()
        others.append(Cluster(cluster.port))

    try:
        _with(runs, place, cluster, after, rng, replace)
    finally:
        for other in others:
            other.end()
    return {"reported": runs.units, "lost": 0, "killed": 1}


def _client_dies(
    runs: Runs, place: Path, cluster: Cluster, after: int, rng: random.Random
) -> dict[str, Any]:
    noted = runs.run(place, kill_when=(after, rng.random() / 5), executor=cluster.address)
    resumed = runs.run(place, executor=cluster.address)
    return {**runs.counts(noted, resumed), "killed": 1}


def _with(
    runs: Runs, place: Path, cluster: Cluster, after: int, rng: random.Random, fault: Any
) -> Notes:
    """What a run noted in which something happened once so many units were finished."""

    def strike() -> None:
        while runs.finished(place) < after:
            time.sleep(0.01)
        time.sleep(rng.random() / 5)
        fault()

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        return runs.run(place, executor=cluster.address)
    finally:
        striker.join()


def _free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port: int = server.getsockname()[1]
        return port


def report(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The figures in Markdown."""
    lines = [
        "`analyze` on a Dask cluster of two workers:",
        "",
        "| fault | runs | killed | units reported as finished | of those, lost "
        "| same metrics.parquet |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for fault, outcomes in found.items():
        reported = [o["reported"] for o in outcomes]
        cells = [
            fault,
            str(len(outcomes)),
            str(sum(o["killed"] for o in outcomes)),
            f"{min(reported)} to {max(reported)}",
            str(sum(o["lost"] for o in outcomes)),
            str(sum(o["same"] for o in outcomes)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
