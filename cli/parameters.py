"""Types of options, which take text from the command line and lists from a configuration file."""

import re
from collections.abc import Iterator
from typing import Any

import click


class Names(click.ParamType):
    """Names separated by commas."""

    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """The names as a tuple."""
        parts = value.split(",") if isinstance(value, str) else value
        names = tuple(str(part).strip() for part in parts)
        return tuple(name for name in names if name)


class Numbers(click.ParamType):
    """Whole numbers separated by commas, and ranges of them: `0,2,5-8`."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers as a tuple."""
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        return tuple(
            number for part in parts for number in self._range(str(part).strip(), param, ctx)
        )

    def _range(
        self, text: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> Iterator[int]:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if match is None:
            self.fail(f"{text!r}: expected numbers and ranges, such as 0,2,5-8.", param, ctx)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            self.fail(f"{text!r}: the range ends before it begins.", param, ctx)
        yield from range(first, last + 1)


FORMAT = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="What to print on stdout.",
)
"""Of the commands that answer what there is."""
