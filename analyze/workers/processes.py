"""Processes as an executor: one that dies takes only its own work with it.

`concurrent.futures.ProcessPoolExecutor` ends all of its processes when one dies and leaves them
behind when their owner is killed. `pebble.ProcessPool` ends only the one, but it is no `Executor`.
Both are multiprocessing's: they run the user's script again in every process, which fails where
that is not guarded, and pass tensors on in shared memory, which dies with its process.
"""

import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from contextlib import suppress
from queue import LifoQueue
from typing import IO, Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
"""Environment of a process whose arithmetic is of one thread."""
START = "from retrace.analyze.workers.processes import serve; serve()"
LENGTH = struct.Struct("<Q")
"""What stands before every message."""
READY = b"ready"
STARTS = 10
"""Processes in a row that may end before they can be called."""
GONE = (OSError, EOFError, ValueError)
"""What reading from a process and writing to it raises when it has ended, or is closed already."""
PATIENCE = 10
"""Seconds from the end of a process's output to its own."""


class WorkerDied(BrokenExecutor):
    """The process that was at work ended before it answered."""


class Processes(ThreadPoolExecutor):
    """Runs functions in fresh interpreters, each with arithmetic of one thread.

    Every process has a thread that waits for it: a death fails one future and is made good by a new
    process. Processes whose owner is gone find their input closed, and end. Functions and what they
    take and return are pickled.
    """

    def __init__(self, count: int, environments: Sequence[Mapping[str, str]] = ({},)) -> None:
        """So many processes, which have one of the environments each, in turn, besides this
        process's own."""
        super().__init__(count, thread_name_prefix="process")
        self._lock = threading.Lock()
        self._closed = False
        self._idle: LifoQueue[_Process] = LifoQueue()
        self._all: set[_Process] = set()
        for i in range(count):  # all at once, since each takes seconds to import
            self._idle.put(self._start(environments[i % len(environments)]))

    @property
    def pids(self) -> set[int]:
        """Ids of the processes that run now."""
        with self._lock:
            return {process.pid for process in self._all}

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function that can be imported, in the next process that has nothing to do."""
        return super().submit(self._call, fn, *args, **kwargs)  # type: ignore[arg-type]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes: when all work is done, or at once if what is left is not wanted."""
        if cancel_futures:
            self._kill()
        super().shutdown(wait, cancel_futures=cancel_futures)
        if wait:
            self._kill()
            for process in self._all:
                process.close()

    def _call(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        process = self._idle.get()
        try:
            for _ in range(STARTS):
                if process.begin():
                    break
                process = self._replace(process)  # nobody's work is to blame
            answer: T = process.call(fn, *args, **kwargs)
        except WorkerDied:
            process = self._replace(process)
            raise
        finally:
            self._idle.put(process)
        return answer

    def _start(self, environment: Mapping[str, str]) -> "_Process":
        with self._lock:
            if self._closed:
                raise WorkerDied("The processes were ended.")
            process = _Process(environment)
            self._all.add(process)
            return process

    def _replace(self, dead: "_Process") -> "_Process":
        dead.kill()
        dead.close()
        with self._lock:
            self._all.discard(dead)
            closed = self._closed
        return dead if closed else self._start(dead.environment)

    def _kill(self) -> None:
        with self._lock:
            self._closed = True
            for process in self._all:
                process.kill()


class _Process:
    """A Python process that answers calls, one after another, through its stdin and stdout."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD, **environment, "PYTHONPATH": path},
            process_group=0,  # Ctrl-C is for its owner, who ends it
        )
        self.pid = self._process.pid
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        self._stdin, self._stdout, self._ready = stdin, stdout, False

    def begin(self) -> bool:
        """Wait until it can be called; False if it has ended."""
        if not self._ready:
            try:
                self._ready = _receive(self._stdout) == READY
            except GONE:
                return False
        return self._process.poll() is None

    def call(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the function returns or raises there."""
        question = pickle.dumps((fn, args, kwargs))
        try:
            _send(self._stdin, question)
            answer = _receive(self._stdout)
        except GONE as error:
            raise WorkerDied(self._last_words()) from error
        returned, value = pickle.loads(answer)
        if returned:
            return value
        raise value

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Close what is left of one that has ended."""
        for stream in (self._stdin, self._stdout):
            with suppress(OSError):  # what was not sent yet has nowhere to go
                stream.close()

    def _last_words(self) -> str:
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            return "a worker closed its output"
        if code >= 0:
            return f"a worker ended with exit code {code}"
        return f"a worker was killed by {signal.Signals(-code).name}"


def serve() -> None:
    """Answer calls until there are no more: what a process of `Processes` does."""
    import torch

    torch.set_num_threads(1)
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a method prints is no answer
    with suppress(EOFError, BrokenPipeError):  # its owner has ended
        _send(answers, READY)
        while True:
            _send(answers, _answer(_receive(questions)))


def _answer(question: bytes) -> bytes:
    """The pickled answer: whether the function returned, and what it returned or raised."""
    try:
        fn, args, kwargs = pickle.loads(question)
        return pickle.dumps((True, fn(*args, **kwargs)))
    except Exception as error:
        told = "".join(traceback.format_exception(error))
        error.add_note(f"In a worker:\n{told}")
        try:
            answer = pickle.dumps((False, error))
            pickle.loads(answer)  # an exception of one's own may go in and not come out
        except Exception:
            answer = pickle.dumps((False, RuntimeError(told)))
        return answer


def _send(stream: IO[bytes], message: bytes) -> None:
    stream.write(LENGTH.pack(len(message)) + message)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    head = stream.read(LENGTH.size)
    message = stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""
    if not message:
        raise EOFError
    return message
