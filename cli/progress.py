"""Progress bars on stderr; none where that is no terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from retrace.traces.progress import ShowDone, ShowStage


@contextmanager
def bars(facts: str, *, shown: bool = True) -> Iterator["Progress"]:
    """Bars that vanish when all is done, each with a description before it and `facts` after it,
    which is a format of `rich.progress`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        "{task.description}",
        BarColumn(bar_width=20),
        facts,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal and shown),
    ) as progress:
        yield progress


@contextmanager
def progress_bars(unit: str = "") -> Iterator["ShowStage"]:
    """A function that shows how many of something are done, and of how many: a bar for each."""
    with bars(f"{{task.completed}}/{{task.total}} {unit}".rstrip()) as progress:
        rows: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in rows:
                rows[what] = progress.add_task(what, total=total)
            progress.update(rows[what], completed=done, total=total)

        yield show


@contextmanager
def progress_bar(
    verb: str = "Replaying", unit: str = "layers of sequences"
) -> Iterator["ShowDone"]:
    """A function that shows how many are done, and of how many."""
    with progress_bars(unit) as show:
        yield lambda done, total: show(verb, done, total)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Shows that something goes on, of which nobody can tell how far it is."""
    with bars("") as progress:
        progress.add_task(what, total=None)
        yield
