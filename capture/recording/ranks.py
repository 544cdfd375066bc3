"""Several processes that share the sequences of one trace, as torchrun starts them."""

import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from retrace.traces import RetraceError

WAIT = datetime.timedelta(minutes=30)
"""How long a process waits for another that says nothing: a large model takes minutes to load, and
by so much more on one machine than on the next."""
JOINING = datetime.timedelta(minutes=2)
"""How long processes that were started together take at most to find each other."""
PAUSE_SECONDS = 0.5


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Number of the process on its machine."""

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As torchrun says in RANK, WORLD_SIZE and LOCAL_RANK; a process on its own without."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            rank, size, local = (int(os.environ.get(name, "0")) for name in names)
        except ValueError as error:
            raise RetraceError("RANK, WORLD_SIZE and LOCAL_RANK must be numbers.") from error
        if not 0 <= rank < size:
            raise RetraceError(f"RANK must be less than WORLD_SIZE ({size}), not {rank}.")
        return cls(rank, size, local)

    @property
    def first(self) -> bool:
        """Whether this process makes and completes the trace, and prints."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device that a process takes where `name` leaves open which GPU."""
        if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local}"
        return name

    @contextlib.contextmanager
    def connected(self) -> Iterator["Meeting"]:
        """What the processes tell each other; an error in here ends the others as well."""
        meeting = Meeting(self, None if self.size == 1 else _connect())
        try:
            yield meeting
        except BaseException as error:
            meeting.fail(error)
            if isinstance(error, Exception):
                meeting.leave(JOINING)
            raise
        meeting.leave(WAIT)


class Meeting:
    """A few words between the processes: that a trace is begun, written, complete, or failed.

    The tensors need none: each process writes bundles of its own.
    """

    def __init__(self, ranks: Ranks, store: Store | None) -> None:
        self.ranks = ranks
        self._store = store
        self._progress: tuple[int, float] = (-1, 0.0)

    def tell(self, what: str, content: Any = None) -> None:
        """Tell all others."""
        if self._store is not None:
            with _explained():
                self._store.set(f"retrace {what}", json.dumps(content))

    def hear(self, what: str) -> Any:
        """Wait until another process tells this."""
        heard = self._await(what, WAIT, self.check)
        if heard is None:
            raise RetraceError(
                f"Rank {self.ranks.rank} waited {WAIT} for another process: look for its error "
                "above, and go on with --resume."
            )
        return json.loads(heard)

    def _await(
        self, what: str, patience: datetime.timedelta, meanwhile: Callable[[], None] | None = None
    ) -> bytes | None:
        """What was told, as it was told; None if nothing was in that time."""
        assert self._store is not None
        end = time.monotonic() + patience.total_seconds()
        while time.monotonic() < end:
            if meanwhile is not None:
                meanwhile()
            with _explained():
                if self._store.check([f"retrace {what}"]):
                    told: bytes = self._store.get(f"retrace {what}")
                    return told
            time.sleep(PAUSE_SECONDS)
        return None

    def check(self) -> None:
        """Stop where another process has failed."""
        if self._store is None:
            return
        with _explained():
            failed = self._store.check(["retrace failed"])
            message = json.loads(self._store.get("retrace failed")) if failed else None
        if message is not None:
            raise RetraceError(message)

    def pause(self, progress: int) -> None:
        """Wait a moment for the others; not for ever if their `progress` stays the same."""
        self.check()
        now = time.monotonic()
        if progress != self._progress[0]:
            self._progress = (progress, now)
        elif now - self._progress[1] > WAIT.total_seconds():
            raise RetraceError(
                f"No process has finished a sequence for {WAIT}: one has died. Go on with --resume."
            )
        time.sleep(PAUSE_SECONDS)

    def fail(self, error: BaseException) -> None:
        """Tell the others to stop, and why; what cannot be told any more is left."""
        words = str(error) if isinstance(error, RetraceError) else f"{type(error).__name__}"
        message = f"Rank {self.ranks.rank} stopped: {words}"
        if words.startswith("Rank "):
            return  # heard from another
        with contextlib.suppress(RetraceError):
            self.tell("failed", message)

    def leave(self, patience: datetime.timedelta) -> None:
        """Go when all are done: the first process, which may hold what is told, goes last."""
        if self._store is None:
            return
        with contextlib.suppress(RetraceError):  # all is said; who has died does not hear it
            if not self.ranks.first:
                self.tell(f"left {self.ranks.rank}")
                return
            for rank in range(1, self.ranks.size):
                self._await(f"left {rank}", patience)


def _connect() -> Store:
    with _explained():
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            raise RetraceError(
                "WORLD_SIZE is set without MASTER_ADDR and MASTER_PORT: start the processes with "
                "torchrun, or unset it."
            )
        # As torchrun's own rendezvous: it serves the store itself, else the first process does.
        serves = (
            os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        )
        return TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=serves,
            timeout=JOINING,
            wait_for_workers=False,
        )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """A connection that breaks, as one line."""
    try:
        yield
    except RetraceError:
        raise
    except (RuntimeError, ValueError) as error:
        raise RetraceError(
            "The processes of this capture cannot reach each other, or one has died: look for its "
            "error above, and go on with --resume."
        ) from error
