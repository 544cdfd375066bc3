"""Streams that are closed, full or gone, and Ctrl-C while modules are loaded: no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from retrace.cli.interruption import interruptible

COMMAND = f"{sys.executable} -m retrace.cli"


@pytest.mark.parametrize(
    ("line", "codes"),
    [
        (f"{COMMAND} methods | head -1", {0}),
        (f"{COMMAND} methods >&-", {0}),
        (f"{COMMAND} methods >&- 2>&-", {0}),
        (f"{COMMAND} methods > /dev/full", {2}),
        (f"{COMMAND} --help > /dev/full", {2}),
    ],
)
def test_streams(line: str, codes: set[int]) -> None:
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode in codes


def test_interrupted_while_loading(tmp_path: Path) -> None:
    # A library that would make an error of its own of it.
    (tmp_path / "slow.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    while True: pass\n"
        "except BaseException as error:\n"
        "    raise ImportError('half loaded') from error\n"
    )
    program = (
        "from retrace.cli.interruption import interruptible\nwith interruptible(): import slow"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.stderr == "\nInterrupted.\n"
    assert done.returncode == 130


def test_interrupted_elsewhere() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
