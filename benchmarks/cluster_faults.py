"""What is lost of a run of `analyze` on a Dask cluster, part of which dies; part of `faults.py`."""

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

from analyze_faults import Runs

ENVIRONMENT = {
    # What servers say of it is for people who look after a cluster.
    "DASK_LOGGING__DISTRIBUTED": "critical",
    # How long a client waits for a scheduler that has ended.
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "3s",
}


async def _serve(kind: str, *place: Any, **settings: Any) -> None:
    import distributed

    async with getattr(distributed, kind)(*place, dashboard=False, **settings) as server:
        await server.finished()


def serve(kind: str, *place: Any, **settings: Any) -> None:
    """A scheduler or worker, in a process of its own, until that ends."""
    asyncio.run(_serve(kind, *place, **settings))


class Cluster:
    """A scheduler and two workers, a process each."""

    def __init__(self, runs: Runs, port: int | None = None) -> None:
        self._runs = runs
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

    def _start(self, *place: Any, **settings: Any) -> BaseProcess:
        process = self._runs.processes.Process(
            target=serve, args=place, kwargs=settings, daemon=True
        )
        process.start()
        return process


def all_faults(runs: Runs, count: int) -> list[dict[str, Any]]:
    """Each of the faults, so many times at random moments."""
    rng = random.Random(4)
    return [
        _trials(runs, count, rng, "a worker killed every 4 units, and replaced", _worker_dies),
        _trials(runs, count, rng, "scheduler killed; the same command on another", _scheduler_dies),
        _trials(runs, count, rng, "scheduler killed; another at its address", _scheduler_returns),
        _trials(runs, count, rng, "client killed; the same command again", _client_dies),
    ]


def _trials(runs: Runs, count: int, rng: random.Random, fault: str, trial: Any) -> dict[str, Any]:
    outcomes = []
    for index in range(count):
        place, cluster = runs.begin(f"cluster-{index}"), Cluster(runs)
        try:
            after = rng.randrange(runs.units)
            noted = trial(runs, place, cluster, after, rng)
        finally:
            cluster.end()
        reported, kept = noted["reported"], noted["kept"]
        same = (place / "r" / "metrics.parquet").read_bytes() == runs.whole
        outcomes.append({**noted, "lost": max(0, reported - kept), "same": same})
        shutil.rmtree(place)
    return {"fault": fault, "outcomes": outcomes}


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
        noted = runs.run(place, executor=cluster.address)
    finally:
        over.set()
        killer.join()
    return {"reported": runs.units, "kept": runs.units, "killed": killed, "line": _line(noted)}


def _scheduler_dies(
    runs: Runs, place: Path, cluster: Cluster, after: int, rng: random.Random
) -> dict[str, Any]:
    noted = _with(runs, place, cluster, after, rng, cluster.scheduler.kill)
    other = Cluster(runs)
    try:
        resumed = runs.run(place, executor=other.address)
    finally:
        other.end()
    return {**_counts(runs, noted, resumed), "killed": 1, "line": _line(noted)}


def _scheduler_returns(
    runs: Runs, place: Path, cluster: Cluster, after: int, rng: random.Random
) -> dict[str, Any]:
    others = []

    def replace() -> None:
        cluster.scheduler.kill()
        cluster.scheduler.join()
        others.append(Cluster(runs, cluster.port))

    try:
        noted = _with(runs, place, cluster, after, rng, replace)
    finally:
        for other in others:
            other.end()
    return {"reported": runs.units, "kept": runs.units, "killed": 1, "line": _line(noted)}


def _client_dies(
    runs: Runs, place: Path, cluster: Cluster, after: int, rng: random.Random
) -> dict[str, Any]:
    noted = runs.run(place, kill_when=(after, rng.random() / 5), executor=cluster.address)
    resumed = runs.run(place, executor=cluster.address)
    return {**_counts(runs, noted, resumed), "killed": 1, "line": _line(resumed)}


def _with(
    runs: Runs, place: Path, cluster: Cluster, after: int, rng: random.Random, fault: Any
) -> list[dict[str, Any]]:
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


def _counts(
    runs: Runs, noted: list[dict[str, Any]], resumed: list[dict[str, Any]]
) -> dict[str, int]:
    reported = max((line.get("done", 0) for line in noted), default=0)
    kept = next((line["done"] for line in resumed if "done" in line), runs.units)
    return {"reported": reported, "kept": kept}


def _line(noted: list[dict[str, Any]]) -> str | None:
    return next((line["line"] for line in noted if "line" in line), None)


def _free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port: int = server.getsockname()[1]
        return port


def report(found: list[dict[str, Any]]) -> list[str]:
    """The figures in Markdown."""
    lines = [
        "`analyze` on a Dask cluster of two workers:",
        "",
        "| fault | runs | killed | units reported as finished | of those, lost "
        "| same metrics.parquet |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for trial in found:
        outcomes = trial["outcomes"]
        reported = [o["reported"] for o in outcomes]
        cells = [
            trial["fault"],
            str(len(outcomes)),
            str(sum(o["killed"] for o in outcomes)),
            f"{min(reported)} to {max(reported)}",
            str(sum(o["lost"] for o in outcomes)),
            str(sum(o["same"] for o in outcomes)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
