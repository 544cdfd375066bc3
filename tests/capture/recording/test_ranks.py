"""Several processes write one trace, to the bytes that one alone would write."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from retrace.capture import Ranks, capture
from retrace.traces import RetraceError, open_trace

Start = Callable[..., "Started"]

SCRIPT = """
import json, multiprocessing, os, sys, time
from transformers import MistralForCausalLM  # what takes seconds to import, for all ranks at once
from retrace.capture import capture
from retrace.traces import TraceWriter, bundles
write_shard = TraceWriter.write_shard
def run(rank, job):
    os.environ |= job["environment"] | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.dup2(os.open(job["errors"][rank], os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    bundles.BUNDLE_POSITIONS = 40 * job["bundle"]
    def slow(self, *shard):
        time.sleep(job["delay"])
        write_shard(self, *shard)
    TraceWriter.write_shard = slow
    capture(job["model"], **job["options"])
fork = multiprocessing.get_context("fork")
for line in sys.stdin:
    ranks = [fork.Process(target=run, args=(rank, json.loads(line))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    print(*(rank.pid for rank in ranks), flush=True)
    for rank in ranks:
        rank.join(240)
    print(*(rank.exitcode for rank in ranks), flush=True)
"""


class Started:
    """Two processes with the environment that torchrun gives them, forked from one."""

    def __init__(
        self,
        parent: subprocess.Popen[str],
        model: str,
        out: Path,
        bundle: int,
        delay: float,
        **options: Any,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._errors = [Path(f"{out}.errors-{rank}") for rank in range(2)]
        self._parent = parent
        job = {
            "model": model,
            "environment": {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": "2",
            },
            "errors": [str(file) for file in self._errors],
            "bundle": bundle,
            "delay": delay,
            "options": {"limit": 8, "max_length": 40, "out": str(out), **options},
        }
        assert parent.stdin is not None
        parent.stdin.write(json.dumps(job) + "\n")
        parent.stdin.flush()
        self.pids = self._numbers()

    def ended(self) -> list[tuple[int, str]]:
        """Exit code of each, and what it said on stderr."""
        codes = self._numbers()
        return list(zip(codes, (file.read_text() for file in self._errors), strict=True))

    def _numbers(self) -> list[int]:
        assert self._parent.stdout is not None
        return [int(number) for number in self._parent.stdout.readline().split()]


@pytest.fixture(scope="module")
def parent() -> Iterator[subprocess.Popen[str]]:
    """What forks the ranks of all tests."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        yield parent
        assert parent.stdin is not None
        parent.stdin.close()


@pytest.fixture
def start(parent: subprocess.Popen[str], model_folder: Any, text_file: Path) -> Start:
    """Starts two ranks, which capture eight sequences of 40 positions."""
    model = str(model_folder("mistral"))

    def start(out: Path, bundle: int = 1, delay: float = 0.0, **options: Any) -> Started:
        given = {"text": [str(text_file)], **options}
        return Started(parent, model, out, bundle, delay, **given)

    return start


def tensors(folder: Path) -> dict[str, bytes]:
    """Every file but the group's own metadata, which holds the time."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent != folder
    }


@pytest.mark.parametrize(("bundle", "batch_size", "killed"), [(1, 2, 0), (2, 3, 1)])
def test_two_ranks_write_what_one_writes(
    bundle: int,
    batch_size: int,
    killed: int,
    start: Start,
    model_folder: Any,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However one of them is killed meanwhile."""
    monkeypatch.setattr("retrace.traces.bundles.BUNDLE_POSITIONS", 40 * bundle)
    model, options = str(model_folder("mistral")), {"max_length": 40, "batch_size": batch_size}
    alone = capture(model, text=[text_file], limit=8, out=tmp_path / "whole", **options)
    assert alone.bundle == bundle
    ranks = start(tmp_path / "t", bundle, 0.3, batch_size=batch_size)
    end = time.monotonic() + 120
    while not (tmp_path / "t").exists() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(random.Random(killed).uniform(0, 1))
    os.kill(ranks.pids[killed], signal.SIGKILL)
    os.kill(ranks.pids[1 - killed], signal.SIGTERM)  # as torchrun does
    assert ranks.ended()[killed][0] == -signal.SIGKILL
    assert len(open_trace(tmp_path / "t").sequences) < 8
    for code, errors in start(tmp_path / "t", bundle, batch_size=batch_size, resume=True).ended():
        assert code == 0, errors
    assert tensors(tmp_path / "t") == tensors(tmp_path / "whole")


@pytest.mark.parametrize("drawn", [{}, {"generate": 6, "temperature": 1.0, "seed": 5}])
def test_two_ranks_read_and_draw_what_one_does(
    drawn: dict[str, Any],
    start: Start,
    model_folder: Any,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("retrace.traces.bundles.BUNDLE_POSITIONS", 40)
    model, options = str(model_folder("mistral")), {"batch_size": 1 if drawn else 2, **drawn}
    capture(model, text=[text_file], limit=8, max_length=40, out=tmp_path / "whole", **options)
    for code, errors in start(tmp_path / "t", **options).ended():
        assert code == 0, errors
    assert tensors(tmp_path / "t") == tensors(tmp_path / "whole")


def test_refusal_of_the_first_ends_the_others(start: Start, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    first, second = (errors for _, errors in start(tmp_path / "t", batch_size=2).ended())
    assert "--overwrite" in first.splitlines()[-1]
    assert "Rank 0 stopped" in second.splitlines()[-1]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ranks.from_environment() == Ranks(0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(5, 8, 1)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(RetraceError, match="less than WORLD_SIZE"):
        Ranks.from_environment()
