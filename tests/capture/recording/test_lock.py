"""Two captures never write one trace at a time, and a dead one keeps nobody out."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrace.capture import Progress, capture
from retrace.traces import RemoteLocation, RetraceError, Trace
from retrace.traces.storage.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from retrace.traces.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(model_folder: Any, text_file: Path, tmp_path: Path) -> Callable[..., Trace]:
    """Captures a small trace at tmp_path/t, with some options changed."""

    def run(**changes: Any) -> Trace:
        options = {"limit": 2, "max_length": 20, "out": tmp_path / "t", **changes}
        return capture(str(model_folder("mistral")), text=[text_file], **options)

    return run


def test_another_process(run: Callable[..., Trace], tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "t")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for changes in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(RetraceError, match="Another capture is writing"):
                run(**changes)
        assert run(out=tmp_path / "other").sequences == (0, 1)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert run().sequences == (0, 1)
    finally:
        holder.kill()
        holder.communicate()


def test_the_same_process(run: Callable[..., Trace], tmp_path: Path) -> None:
    refused = []

    def again(progress: Progress) -> None:
        if progress.stage == "recording":
            with pytest.raises(RetraceError, match="Another capture") as error:
                run(resume=True)
            refused.append(error)

    assert run(progress=again).sequences == (0, 1)
    assert refused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["birds.txt", "t"]


def test_nothing_is_left_of_a_capture_that_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), locked(tmp_path / "traces" / "t"):
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_left_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / ".t.lock").write_text("")
    started = time.monotonic()
    with locked(tmp_path / "t"):
        assert (tmp_path / ".t.lock").exists()
    assert time.monotonic() - started < 5


def test_object_stores_have_no_locks() -> None:
    with locked(RemoteLocation("s3://bucket/t")), locked(RemoteLocation("s3://bucket/t")):
        pass
