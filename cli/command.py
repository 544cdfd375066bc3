"""What all commands have in common: mistakes in one line, and warnings on stderr."""

import errno
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

TYPED = "retrace.cli.typed"
"""Where a context keeps what the user typed."""
INTERRUPTED = 130
"""Exit code of a shell's command that Ctrl-C ended."""
UNHEARD = ("asyncio", "distributed.client")
"""Loggers of libraries that show tracebacks of errors which are raised as well."""


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
        try:
            with warnings_on_stderr():
                return super().invoke(ctx)
        except ValueError as error:
            # Imported late: a help page must not wait for Zarr, which comes with it.
            from retrace.traces import RetraceError

            if not isinstance(error, RetraceError):
                raise
            raise click.UsageError(str(error), ctx) from error
        except OSError as error:
            words = _words(error)
            if words is None:
                raise
            raise click.UsageError(words, ctx) from error
        except KeyboardInterrupt:
            click.echo(f"\nInterrupted. {self.interrupted}".rstrip(), err=True)
            ctx.exit(INTERRUPTED)


def _words(error: OSError) -> str | None:
    """What an error of the system means; None where nobody but us can mend it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f" ({error.filename})" if error.filename else ""
        return f"The disk is full{place}: make room, or write elsewhere with --out."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and error.filename:
        return (
            f"{error.filename}: {error.strerror}. Choose another place, with --out for what is "
            "written."
        )
    return None


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
        click.echo(f"{level}{record.getMessage()}", err=True)
