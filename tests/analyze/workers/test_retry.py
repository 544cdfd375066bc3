"""Calls come back one by one, however many there are."""

import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

from retrace.analyze.workers.retry import finished


class OneByOne(Executor):
    """Runs a call when it is told to, so that one is done at a time; the first when `count` are
    there."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, partial(fn, *args, **kwargs)))
        if len(self.waiting) == self.count:
            self.go_on()
        return future

    def go_on(self) -> None:
        """Run the next one, if any."""
        if self.waiting:
            future, call = self.waiting.popleft()
            future.set_result(call())


def steps(count: int) -> int:
    """How many functions are called while so many calls come back."""
    pool, called, found = OneByOne(count), 0, []

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal called
        called += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        for answer in finished(pool, {i: partial(int, i) for i in range(count)}):
            found.append(answer)
            pool.go_on()
    finally:
        sys.setprofile(None)
    assert found == [(i, i) for i in range(count)]
    return called


def test_twice_as_many_calls_take_twice_as_many_steps() -> None:
    assert steps(400) < 2.5 * steps(200)
