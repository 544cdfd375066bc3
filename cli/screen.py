"""Words and numbers as they are printed; rich is loaded only by what draws with it."""

import json
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console


def size(count: int) -> str:
    """Bytes in decimal units.

    >>> size(1_234_567)
    '1.2 MB'
    """
    for unit, exponent in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**exponent:
            return f"{count / 10**exponent:,.1f} {unit}"
    return f"{count} bytes"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers with runs joined.

    >>> ranges([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def plural(count: int, word: str) -> str:
    """A count and its word.

    >>> plural(2, "layer")
    '2 layers'
    """
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def note(text: str) -> None:
    """A message for people, on stderr."""
    click.echo(text, err=True)


def print_json(content: Any) -> None:
    """Print JSON on stdout; NaN, which JSON has no word for, is null."""
    click.echo(json.dumps(_without_nan(content), indent=2, default=str))


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def on_terminal() -> bool:
    """Whether stdout is read by a person."""
    return sys.stdout.isatty()


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    left: Sequence[str] = (),
    err: bool = False,
) -> None:
    """Print a table on stdout, or stderr, that fits the terminal; the first column and those named
    in `left` begin at the left, the others end at the right.

    Where that is no terminal, the table is as wide as its contents.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console, rows = _console(err), [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    narrow = sum(widths) + 3 * len(widths) > console.width
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for i, column in enumerate(columns):
        if i == 0 or column in left:
            table.add_column(Text(column), overflow="fold")
        else:  # figures need less room than their names: break these before anything else
            name = column.replace(" ", "\n") if narrow else column
            table.add_column(Text(name), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names and their values on stdout, one a line."""
    facts = list(facts)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        click.echo(f"{name:<{width}}  {value}")


def _console(err: bool) -> "Console":
    from rich.console import Console

    file = sys.stderr if err else sys.stdout
    seen = file.isatty() if err else on_terminal()
    width = shutil.get_terminal_size().columns if seen else 1000
    return Console(file=file, width=width, highlight=False)
