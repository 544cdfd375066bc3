"""Several processes write one trace, to the bytes that one alone would write."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from retrace.capture import Ranks, capture
from retrace.traces import RetraceError, open_trace

SCRIPT = """
import sys
from pathlib import Path
from retrace.capture import capture
model, text, out, resume, delay = sys.argv[1:]
import time
from retrace.traces import TraceWriter
write_shard = TraceWriter.write_shard
def slow(self, *shard):
    time.sleep(float(delay))
    write_shard(self, *shard)
TraceWriter.write_shard = slow
capture(model, text=[text], limit=8, max_length=40, batch_size=2, out=out, resume=resume == "1")
"""


def start(arguments: list[str], *, resume: bool, delay: float = 0.0) -> list[subprocess.Popen[Any]]:
    """Two processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SCRIPT, *arguments, str(int(resume)), str(delay)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]


def tensors(folder: Path) -> dict[str, bytes]:
    """Every file but the group's own metadata, which holds the time."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent != folder
    }


@pytest.fixture
def whole(model_folder: Any, text_file: Path, tmp_path: Path) -> dict[str, bytes]:
    """What one process writes."""
    options: dict[str, Any] = {"limit": 8, "max_length": 40, "batch_size": 2}
    model = str(model_folder("mistral"))
    return tensors(capture(model, text=[text_file], out=tmp_path / "whole", **options).path)


@pytest.mark.parametrize("killed", [None, 0, 1])
def test_two_ranks_write_what_one_writes(
    killed: int | None,
    whole: dict[str, bytes],
    model_folder: Any,
    text_file: Path,
    tmp_path: Path,
) -> None:
    arguments = [str(model_folder("mistral")), str(text_file), str(tmp_path / "t")]
    if killed is not None:
        ranks = start(arguments, resume=False, delay=0.3)
        end = time.monotonic() + 120
        while not (tmp_path / "t").exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(random.Random(killed).uniform(0, 1))
        ranks[killed].kill()
        ranks[1 - killed].send_signal(signal.SIGTERM)  # as torchrun does
        for rank in ranks:
            rank.communicate()
        assert len(open_trace(tmp_path / "t").sequences) < 8
    ranks = start(arguments, resume=killed is not None)
    for rank in ranks:
        _, errors = rank.communicate(timeout=240)
        assert rank.returncode == 0, errors.decode()
    assert tensors(tmp_path / "t") == whole


def test_refusal_of_the_first_ends_the_others(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "t").mkdir()
    arguments = [str(model_folder("mistral")), str(text_file), str(tmp_path / "t")]
    errors = [rank.communicate(timeout=240)[1].decode() for rank in start(arguments, resume=False)]
    assert "--overwrite" in errors[0].splitlines()[-1]
    assert "Rank 0 stopped" in errors[1].splitlines()[-1]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ranks.from_environment() == Ranks(0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(5, 8, 1)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(RetraceError, match="less than WORLD_SIZE"):
        Ranks.from_environment()
