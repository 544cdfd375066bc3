"""A Dask cluster as an executor, whose scheduler may be gone at any moment.

`Client.get_executor` is one too, but what is fetched while the scheduler ends never arrives there,
and what is cancelled afterwards ends in tracebacks.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any, NoReturn, ParamSpec, TypeVar

from retrace.analyze.optional import optional
from retrace.traces import RetraceError

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("retrace")

PAUSE = 1.0
"""Seconds between looks at whether a client still has a scheduler."""


@contextmanager
def cluster(address: str) -> Iterator[tuple[Executor, int]]:
    """The workers of the Dask cluster whose scheduler is at an address, and their cores.

    A scheduler that ends is waited for as long as Dask's `distributed.comm.timeouts.connect` says;
    another one at its address goes on.

    Raises:
        RetraceError: dask.distributed is not installed, or no scheduler answers there, be it from
            the beginning or from some moment on.
    """
    distributed = optional(
        "distributed", "pip install 'retrace-attention[cluster]'", "A Dask cluster"
    )
    try:
        client = distributed.Client(address, set_as_default=False)
    except (OSError, ValueError) as error:
        raise RetraceError(f"No Dask scheduler answers at {address} ({error}).") from error
    with client:
        try:
            cores = sum(client.ncores().values())
            if not cores:
                log.warning(
                    "The Dask scheduler at %s has no workers yet: they are waited for.", address
                )
            with Cluster(client) as executor:
                yield executor, cores or 1
        except Exception as error:
            if isinstance(error, RetraceError) or client.status == "running":
                raise
            raise RetraceError(
                f"The Dask scheduler at {address} is gone. What is finished is kept in the results "
                "folder: the same command goes on from there, with this scheduler or another."
            ) from error


class Cluster(Executor):
    """Runs functions on the workers of a client's cluster."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._pending: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="cluster", daemon=True).start()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function that can be pickled. What is not wanted any more ends with the client."""
        ours: Future[T] = Future()
        theirs = self._client.submit(fn, *args, **kwargs, pure=False)
        with self._lock:
            self._pending.add(ours)
        theirs.add_done_callback(lambda done: self._settle(ours, lambda: _result(done)))
        return ours

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Look after nothing any more."""
        self._over.set()

    def _watch(self) -> None:
        """Settle what waits for a client that gave up: where its thread ends first, Dask calls
        nobody back."""
        while not self._over.wait(PAUSE):
            if self._client.status in ("closing", "closed"):
                with self._lock:
                    pending = list(self._pending)
                for ours in pending:
                    self._settle(ours, _lost)

    def _settle(self, ours: Future[T], result: Callable[[], T]) -> None:
        """Give a future the result or what that raises, once: somebody waits for it."""
        error: BaseException | None = None
        try:
            answer = result()  # which may never come, so that it is not claimed before
        except BaseException as raised:
            error = raised
        with self._lock:
            if ours not in self._pending:
                return
            self._pending.remove(ours)
        if not ours.set_running_or_notify_cancel():
            return
        if error is None:
            ours.set_result(answer)
        else:
            ours.set_exception(error)


def _result(theirs: Any) -> Any:
    """What became of Dask's future."""
    return _lost() if theirs.cancelled() else theirs.result()  # cancelled by nobody here


def _lost() -> NoReturn:
    raise ConnectionError("the connection to the Dask scheduler was lost")
