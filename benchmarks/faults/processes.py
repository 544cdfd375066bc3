"""Processes that may be killed, and what they note in a file until then."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    # What Dask's servers say of it is for people who look after a cluster.
    "DASK_LOGGING__DISTRIBUTED": "critical",
    # How long a client waits for a scheduler that has ended.
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "3s",
}
IMPORTED = [
    "benchmarks.tiny_models",
    "retrace.capture.commands.capture",
    "retrace.analyze.commands.analyze",
    "distributed",
]
"""Modules that each process has when it begins."""

Notes = list[dict[str, Any]]
"""What a process noted, each with the time `at` which it did."""


def prepare() -> None:
    """Set up the server that processes are forked from, before the first of them."""
    os.environ |= ENVIRONMENT
    # The server finds modules by the environment alone.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)


def begin(target: Callable[..., None], *arguments: Any, daemon: bool = False) -> BaseProcess:
    """Start a process; a daemon ends with this one, and has no processes of its own."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=target, args=arguments, daemon=daemon)
    process.start()
    return process


def end(process: BaseProcess, after: float | None = None) -> None:
    """Wait for a process, and kill it after so many seconds."""
    process.join(after)
    process.kill()
    process.join()


def note(log: Path, **facts: Any) -> None:
    """Add a line to a file that outlives the process."""
    with log.open("ab", buffering=0) as file:
        file.write((json.dumps({**facts, "at": time.time()}) + "\n").encode())


def noted(log: Path) -> Notes:
    """What was noted until now."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
