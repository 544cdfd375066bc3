"""A Dask cluster as an executor, whose scheduler may be gone at any moment.

`Client.get_executor` is one too, but what is fetched while the scheduler ends never arrives there,
and what is cancelled afterwards ends in tracebacks.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

from retrace.analyze.libraries import optional
from retrace.traces import RetraceError

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("retrace")


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
            yield _Cluster(client), cores or 1
        except Exception as error:
            if isinstance(error, RetraceError) or client.status == "running":
                raise
            raise RetraceError(
                f"The Dask scheduler at {address} is gone. What is finished is kept in the results "
                "folder: the same command goes on from there, with this scheduler or another."
            ) from error


class _Cluster(Executor):
    """Runs functions on the workers of a client's cluster."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function that can be pickled. What is not wanted any more ends with the client."""
        ours: Future[T] = Future()
        theirs = self._client.submit(fn, *args, **kwargs, pure=False)
        theirs.add_done_callback(partial(_pass_on, ours))
        return ours


def _pass_on(ours: Future[Any], theirs: Any) -> None:
    """What became of Dask's future, whatever that is: somebody waits for it."""
    if not ours.set_running_or_notify_cancel():
        return
    try:
        if theirs.cancelled():  # by nobody here
            raise ConnectionError("the connection to the Dask scheduler was lost")
        ours.set_result(theirs.result())
    except BaseException as error:
        ours.set_exception(error)
