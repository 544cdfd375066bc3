"""Several processes write one trace, to the bytes that one alone would write."""

import json
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
import json, multiprocessing, os, sys, time
from transformers import MistralForCausalLM  # what takes seconds to import, for all ranks at once
from retrace.capture import capture
from retrace.traces import TraceWriter, bundles
bundle, batch_size, model, text, out, resume, delay = sys.argv[1:]
bundles.BUNDLE_POSITIONS = 40 * int(bundle)
write_shard = TraceWriter.write_shard
def slow(self, *shard):
    time.sleep(float(delay))
    write_shard(self, *shard)
TraceWriter.write_shard = slow
def run(rank):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.dup2(os.open(f"{out}.errors-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    capture(
        model, text=[text], limit=8, max_length=40, batch_size=int(batch_size), out=out,
        resume=resume == "1", **json.loads(os.environ.get("CAPTURE_OPTIONS", "{}")),
    )
fork = multiprocessing.get_context("fork")
ranks = [fork.Process(target=run, args=(rank,)) for rank in range(2)]
for rank in ranks:
    rank.start()
print(*(rank.pid for rank in ranks), flush=True)
for rank in ranks:
    rank.join()
print(*(rank.exitcode for rank in ranks))
"""


class Started:
    """Two processes with the environment that torchrun gives them, forked from one."""

    def __init__(self, arguments: list[str], *, resume: bool, delay: float = 0.0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        self._errors = [Path(f"{arguments[-1]}.errors-{rank}") for rank in range(2)]
        self._parent = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments, str(int(resume)), str(delay)],
            env={**os.environ, **shared},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._parent.stdout is not None
        self.pids = [int(pid) for pid in self._parent.stdout.readline().split()]

    def ended(self) -> list[tuple[int, str]]:
        """Exit code of each, and what it said on stderr."""
        codes, _ = self._parent.communicate(timeout=240)
        errors = [file.read_text() for file in self._errors]
        return list(zip(map(int, codes.split()), errors, strict=True))


def tensors(folder: Path) -> dict[str, bytes]:
    """Every file but the group's own metadata, which holds the time."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent != folder
    }


@pytest.mark.parametrize(
    ("bundle", "batch_size", "killed"),
    [(1, 2, None), (1, 2, 0), (2, 3, 1)],
)
def test_two_ranks_write_what_one_writes(
    bundle: int,
    batch_size: int,
    killed: int | None,
    model_folder: Any,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("retrace.traces.bundles.BUNDLE_POSITIONS", 40 * bundle)
    model, options = str(model_folder("mistral")), {"max_length": 40, "batch_size": batch_size}
    alone = capture(model, text=[text_file], limit=8, out=tmp_path / "whole", **options)
    assert alone.bundle == bundle
    arguments = [str(bundle), str(batch_size), model, str(text_file), str(tmp_path / "t")]
    if killed is not None:
        ranks = Started(arguments, resume=False, delay=0.3)
        end = time.monotonic() + 120
        while not (tmp_path / "t").exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(random.Random(killed).uniform(0, 1))
        os.kill(ranks.pids[killed], signal.SIGKILL)
        os.kill(ranks.pids[1 - killed], signal.SIGTERM)  # as torchrun does
        assert ranks.ended()[killed][0] == -signal.SIGKILL
        assert len(open_trace(tmp_path / "t").sequences) < 8
    for code, errors in Started(arguments, resume=killed is not None).ended():
        assert code == 0, errors
    assert tensors(tmp_path / "t") == tensors(tmp_path / "whole")


def test_two_ranks_draw_what_one_draws(
    model_folder: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrace.traces.bundles.BUNDLE_POSITIONS", 40)
    model, drawn = str(model_folder("mistral")), {"generate": 6, "temperature": 1.0, "seed": 5}
    options: dict[str, Any] = {"limit": 8, "max_length": 40, **drawn}
    capture(model, text=[text_file], out=tmp_path / "whole", **options)
    monkeypatch.setenv("CAPTURE_OPTIONS", json.dumps(drawn))
    arguments = ["1", "1", model, str(text_file), str(tmp_path / "t")]
    for code, errors in Started(arguments, resume=False).ended():
        assert code == 0, errors
    assert tensors(tmp_path / "t") == tensors(tmp_path / "whole")


def test_refusal_of_the_first_ends_the_others(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "t").mkdir()
    arguments = ["1", "2", str(model_folder("mistral")), str(text_file), str(tmp_path / "t")]
    first, second = (errors for _, errors in Started(arguments, resume=False).ended())
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
