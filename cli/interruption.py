"""Ctrl-C while modules are loaded: they are left half loaded, and say so in their own words."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130
"""Exit code of a shell's command that Ctrl-C ended."""


def end_while_loading(number: int, frame: FrameType | None) -> None:
    """End at once where a module is being loaded: nothing is begun that would have to be ended.
    Elsewhere it is a KeyboardInterrupt, as usual."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"\nInterrupted.\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the command in one line, also while modules are loaded."""
    usual = signal.getsignal(signal.SIGINT)
    ours = usual in (signal.default_int_handler, signal.SIG_DFL)
    if not ours or threading.current_thread() is not threading.main_thread():
        yield  # somebody else looks after it
        return
    signal.signal(signal.SIGINT, end_while_loading)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
