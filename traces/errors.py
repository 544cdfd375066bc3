"""The errors that mean: the user can mend this."""

from collections.abc import Iterable
from difflib import get_close_matches


class RetraceError(ValueError):
    """A mistake in what was asked for: one line that names the cause and the cure.

    The command line prints it without a traceback and exits with code 2.
    """


class UnreachableError(RetraceError):
    """What is stored under a URL cannot be read or written, now or at all."""


class DamageError(RetraceError):
    """Something of a trace is not as it was written, or was written by what is no capture."""

    def __init__(self, place: str, array: str, sequence: int | None, cause: str) -> None:
        super().__init__(place, array, sequence, cause)  # all of them, so that it can be pickled
        self.place = place
        self.array = array
        """Its path in the trace, such as `layers/3/key`; empty for the trace's own metadata."""
        self.sequence = sequence
        """The damaged sequence; None where all are concerned."""
        self.cause = cause

    @property
    def layer(self) -> int | None:
        """The layer that the array is of, if of one."""
        parts = self.array.split("/")
        return int(parts[1]) if len(parts) > 1 else None

    @property
    def tensor(self) -> str:
        """The array's own name; `metadata` for those of a layer or of the trace."""
        name = self.array.rpartition("/")[2]
        return "metadata" if not name or name.isdigit() else name

    @property
    def what(self) -> str:
        """The damaged array in words."""
        where = [] if self.layer is None else [f"layer {self.layer}"]
        where += [] if self.sequence is None else [f"sequence {self.sequence}"]
        return self.tensor + (f" of {', '.join(where)}" if where else "")

    def __str__(self) -> str:
        return (
            f"{self.place}: {self.what} is damaged ({self.cause}). "
            f"`retrace verify {self.place}` tells what else is, and what is whole."
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known words that are near, as they stand in an error; nothing where none is.

    >>> did_you_mean("qest", ["exact", "quest"])
    ' Did you mean quest?'
    """
    close = get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""
