"""Words and numbers as they are printed; rich is loaded only by what draws with it."""

import csv
import io
import json
import math
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from retrace.analyze.outputs.shown import shown

if TYPE_CHECKING:
    from rich.console import Console

LEAST_NAME = 10
"""How narrow the first column of a table may be, where the others are as narrow as they can."""


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


def say(text: object, *, err: bool = False, nl: bool = True) -> None:
    """Print a text, or a path, so that a terminal shows all of it and obeys nothing."""
    click.echo(shown(str(text)), err=err, nl=nl)


def note(text: str) -> None:
    """A message for people, on stderr."""
    say(text, err=True)


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


def print_csv(rows: Sequence[Mapping[Any, Any]]) -> None:
    """Print rows on stdout as comma-separated values with the names of their columns; what is not
    known is empty, and what is no single value is JSON."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(columns)
    lines.writerows([_csv_cell(row.get(name)) for name in columns] for row in rows)
    say(file.getvalue(), nl=False)


def _csv_cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, dict | list | tuple):
        return json.dumps(_without_nan(value), default=str)
    return value


def on_terminal() -> bool:
    """Whether stdout is read by a person."""
    return sys.stdout.isatty()


def default_format() -> str:
    """A table for people, Markdown for files."""
    return "table" if on_terminal() else "markdown"


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    left: Sequence[str] = (),
    err: bool = False,
    form: str = "table",
    widest: int | None = None,
) -> None:
    """Print a table on stdout, or stderr, that fits the terminal; the first column and those named
    in `left` begin at the left, the others end at the right.

    Where that is no terminal, the table is as wide as its contents, `widest` at the most. With
    `markdown` as the form it is a pipe table under a heading.
    """
    if form == "markdown":
        heading = "" if title is None else f"### {title}\n"
        say(f"{heading}\n{_pipe_table([columns, ['---'] * len(columns), *rows])}\n", err=err)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = _console(err)
    rows = [[shown(cell) for cell in row] for row in rows]
    console.width = min(console.width, widest or console.width)
    title = None if title is None else shown(title)
    cells = list(zip(columns, *rows, strict=True))
    widths = [max(map(len, column)) for column in cells]
    edges, gap = 2, 3
    if narrow := edges + sum(widths) + gap * (len(widths) - 1) > console.width:
        gap = 2
        widths = _narrowed(cells, console.width - edges - gap * (len(widths) - 1))
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0) if narrow else (0, 1),
        pad_edge=False,
    )
    for i, (column, width) in enumerate(zip(columns, widths, strict=True)):
        justify: Literal["left", "right"] = "left" if i == 0 or column in left else "right"
        table.add_column(Text(column), justify=justify, width=width, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # Where figures would have to break, the terminal breaks the lines.
    console.width = max(console.width, edges + sum(widths) + gap * (len(widths) - 1))
    console.print(table)


def _pipe_table(rows: Iterable[Sequence[str]]) -> str:
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _narrowed(cells: Sequence[Sequence[str]], room: int) -> list[int]:
    """Widths of columns that come to `room`: what is over the longest word of each is shared out;
    only the first, which names the row, is ever narrower than that."""
    widest = [max(map(len, column)) for column in cells]
    least = [max(len(word) for cell in column for word in cell.split() or [""]) for column in cells]
    least[0] = max(min(least[0], LEAST_NAME), least[0] - max(0, sum(least) - room))
    over = [most - few for most, few in zip(widest, least, strict=True)]
    spare = max(0, room - sum(least))
    return [few + spare * more // max(1, sum(over)) for few, more in zip(least, over, strict=True)]


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print names and their values on stdout, one a line, or more where a terminal is narrow."""
    facts = list(facts)
    indent = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        lines = _wrapped(value, indent)
        say(f"{name:<{indent}}" + f"\n{'':{indent}}".join(lines))


def print_words(text: str) -> None:
    """Print paragraphs on stdout, as wide as a terminal is, or as they are."""
    paragraphs = text.split("\n\n")
    if on_terminal():
        paragraphs = ["\n".join(_wrapped(" ".join(one.split()))) for one in paragraphs]
    say("\n\n".join(paragraphs))


def _wrapped(text: str, indent: int = 0) -> list[str]:
    """The lines of a text beside an indent; what goes to a file is one."""
    if not on_terminal():
        return [text]
    room = max(20, shutil.get_terminal_size().columns - indent)
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return lines or [""]


def _console(err: bool) -> "Console":
    from rich.console import Console

    file = sys.stderr if err else sys.stdout
    seen = file.isatty() if err else on_terminal()
    width = shutil.get_terminal_size().columns if seen else 1000
    return Console(file=file, width=width, highlight=False)
