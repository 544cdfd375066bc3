"""What all commands have in common: mistakes in one line, and warnings on stderr."""

import errno
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from retrace.analyze.outputs.shown import shown
from retrace.cli.interruption import INTERRUPTED, interruptible
from retrace.cli.screen import say
from retrace.cli.streams import open_closed_streams

TYPED = "retrace.cli.typed"
"""Where a context keeps what the user typed."""
UNHEARD = (
    "asyncio",
    "distributed.client",
    "accelerate.big_modeling",
    "bitsandbytes.autograd._functions",
)
"""Loggers of libraries that show tracebacks of errors which are raised as well, or tell of what was
asked for: weights that are kept elsewhere, and every product that is rounded to 8 bits."""


class Command(click.Command):
    """A command that answers mistakes with one line and exit code 2, and no traceback.

    Other exceptions are bugs of ours: they show a traceback, and exit with code 1.
    """

    def __init__(self, *args: Any, interrupted: str = "", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.interrupted = interrupted
        """How to go on after Ctrl-C."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and note what was typed."""
        ctx.meta[TYPED] = shlex.join(["retrace", str(self.name), *args])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        for name in UNHEARD:
            logging.getLogger(name).disabled = True
        open_closed_streams()
        try:
            with warnings_on_stderr(), interruptible():
                answer = super().invoke(ctx)
                sys.stdout.flush()  # where it fails, it fails here
                return answer
        except ValueError as error:
            # Imported late: a help page must not wait for Zarr, which comes with it.
            from retrace.traces import RetraceError

            if not isinstance(error, RetraceError):
                raise
            # Of an error in a user's own method, the lines of its code.
            told = "\n".join([str(error), *getattr(error, "__notes__", ())])
            raise click.UsageError(shown(told), ctx) from error
        except OSError as error:
            words = _words(error)
            if words is None:
                raise
            raise click.UsageError(shown(words), ctx) from error
        except KeyboardInterrupt:
            click.echo(f"\nInterrupted. {self.interrupted}".rstrip(), err=True)
            ctx.exit(INTERRUPTED)


def _words(error: OSError) -> str | None:
    """What an error of the system means; None where nobody but us can mend it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f" ({error.filename})" if error.filename else ""
        return f"The disk is full{place}: make room, or write elsewhere with --out."
    if error.errno in _FAILING:
        place = f" ({error.filename})" if error.filename else ""
        return f"The disk fails{place}: {error.strerror}. What was finished before is kept."
    if error.errno in _PLACES and error.filename:
        return (
            f"{error.filename}: {error.strerror}. Choose another place, with --out for what is "
            "written."
        )
    return None


_FAILING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOLCK)
"""What goes wrong with disks, and with those of other machines."""
_PLACES = (
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG, errno.EFBIG, errno.EXDEV, errno.EBUSY,
    errno.ETXTBSY, errno.ENXIO, errno.EINVAL,
)  # fmt: skip
"""What is wrong with the place of a file."""


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Show what retrace logs as one line on stderr each, warnings as such."""
    logger, handler = logging.getLogger("retrace"), _Lines(logging.INFO)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.capitalize()}: "
        say(f"{level}{record.getMessage()}", err=True)
