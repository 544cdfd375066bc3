"""Captures in processes of their own that are forked from one, which imports PyTorch once."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def asked() -> Iterator[Callable[[str], Callable[..., int]]]:
    """Starts a script that answers each line of JSON by a number, for all tests of a file."""
    with contextlib.ExitStack() as processes:

        def start(script: str) -> Callable[..., int]:
            process = processes.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", script],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            assert process.stdin is not None and process.stdout is not None
            stdin, stdout = process.stdin, process.stdout
            processes.callback(stdin.close)  # upon which it ends

            def ask(*what: Any) -> int:
                stdin.write(json.dumps(what) + "\n")
                stdin.flush()
                return int(stdout.readline())

            return ask

        yield start
