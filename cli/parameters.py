"""Types of options, which take text from the command line and lists from a configuration file."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import click
from click.shell_completion import CompletionItem

from retrace.cli.completion import method_specs
from retrace.cli.documented import documented
from retrace.cli.screen import default_format

MOST_NUMBERS = 1_000_000
"""Of one range: more are a slip of the finger, or a file that was made to fill the memory."""


def names(value: Any) -> tuple[str, ...]:
    """Names separated by commas.

    >>> names("a, b")
    ('a', 'b')
    """
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    return tuple(name for part in parts if (name := str(part).strip()))


def spec(value: Any) -> str:
    """A method's spec, as text or as a file's mapping of its name to its parameters.

    >>> spec({"quest": {"page": [8, 16], "pool": None}})
    'quest:page={8,16},pool=none'
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise click.BadParameter(
            f"{str(value)[:80]!r}: expected a line such as `quest: {{page: 16}}`."
        )
    ((name, parameters),) = value.items()
    if not isinstance(parameters, dict | None):
        raise click.BadParameter(f"{name}: expected parameters such as `{{page: [8, 16]}}`.")
    listed = [f"{key}={_values(key, given)}" for key, given in (parameters or {}).items()]
    return ":".join([str(name), *([",".join(listed)] if listed else [])])


class _Spec(click.types.FuncParamType):  # type: ignore[type-arg]  # no generic before click 8.4
    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return method_specs(ctx, param, incomplete)


SPEC = _Spec(spec)
"""Of every option and argument that names a method with its parameters."""


def _values(key: Any, given: Any) -> str:
    """A parameter's value, or its values in braces."""
    listed = given if isinstance(given, list) else [given]
    texts = ["none" if value is None else str(value) for value in listed]
    if not listed or any(isinstance(value, dict | list) for value in listed):
        raise click.BadParameter(f"{key}: expected a value or a list of them.")
    if any(mark in text for text in [str(key), *texts] for mark in ",{}"):
        raise click.BadParameter(f"{key}: a value has no comma and no brace; a list is `[8, 16]`.")
    return "{" + ",".join(texts) + "}" if isinstance(given, list) else texts[0]


def numbers(value: Any) -> tuple[int, ...]:
    """Whole numbers separated by commas, and ranges of them.

    >>> numbers("0,2,5-8")
    (0, 2, 5, 6, 7, 8)
    """
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    return tuple(number for part in parts for number in _range(str(part).strip()))


def _range(text: str) -> Iterator[int]:
    match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", text)
    if match is None:
        raise click.BadParameter(f"{text[:80]!r} is neither a number nor a range, such as 0,2,5-8.")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise click.BadParameter(f"The range {text!r} ends before it begins.")
    if last - first >= MOST_NUMBERS:
        raise click.BadParameter(f"The range {text!r} has more than {MOST_NUMBERS:,} numbers.")
    yield from range(first, last + 1)


def shares(value: Any) -> tuple[float, ...]:
    """Shares separated by commas.

    >>> shares("0.125,0.25")
    (0.125, 0.25)
    """
    found = []
    for text in names(str(value) if isinstance(value, float | int) else value):
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not 0 < share < math.inf:
            raise click.BadParameter(f"{text[:80]!r} is no share of the bytes, such as 0.125.")
        found.append(share)
    return tuple(found)


def mapping(value: Any) -> dict[str, Any]:
    """Names and values, as JSON or as a file's mapping.

    >>> mapping('{"max_seq_lengths": [4096]}')
    {'max_seq_lengths': [4096]}
    """
    try:
        held = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        cause = str(error).partition(":")[0]
        raise click.BadParameter(f"{value[:80]!r} is no JSON: {cause}.") from error
    if not isinstance(held, dict):
        raise click.BadParameter(
            f"{str(value)[:80]!r} is no mapping: expected one such as "
            '{"max_seq_lengths": [4096]}.'
        )
    return held


def text_or_mapping(value: Any) -> str | dict[str, Any]:
    """Text, which may be JSON, or a file's mapping.

    >>> text_or_mapping({"load_in_4bit": True})
    {'load_in_4bit': True}
    """
    return value if isinstance(value, dict) else str(value)


def one_of(value: Any) -> tuple[int, int]:
    """One of so many parts.

    >>> one_of("2/8")
    (2, 8)
    """
    match = re.fullmatch(r"(\d+)/(\d+)", str(value).strip())
    if match is None:
        raise click.BadParameter(f"{value!r} is not of the form 2/8.")
    return int(match[1]), int(match[2])


def least_position(value: Any) -> int | str:
    """The first position that counts, or `each` for one of each budget's own.

    >>> least_position("500"), least_position("each")
    (500, 'each')
    """
    text = str(value).strip()
    if text == "each":
        return text
    if not re.fullmatch(r"\d{1,18}", text):
        raise click.BadParameter(f"{text[:80]!r} is neither a position nor `each`.")
    return int(text)


FORMAT = click.option(
    "--format",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="What to print on stdout.",
)
"""Of the commands that answer in facts."""
ROWS_FORMAT = click.option(
    "--format",
    type=click.Choice(["table", "markdown", "json", "csv"]),
    callback=lambda ctx, param, value: value or default_format(),
    help="What to print on stdout: a table, as such or in Markdown, or all there is as JSON or "
    "CSV. By default table on a terminal, else markdown.",
)
"""Of the commands that answer in rows."""

analysis = documented(
    "retrace.analyze", "options.py", "WorkOptions", "AnalysisOptions", "RunOptions"
)
"""Makes the options of the commands that read a trace's tensors."""
LAYERS = analysis("--layers", type=numbers, metavar="0,2,5-8")
DEVICE = analysis("--device", default="auto", show_default=True, metavar="NAME")
WORKERS = analysis("--workers", type=click.IntRange(min=1), metavar="N")
SCHEDULER = analysis("--scheduler", sets="executor", metavar="ADDRESS")
PROTOCOL = analysis("--protocol", default="all", show_default=True, metavar="WHICH")
CALIBRATION = analysis("--calibration", sets="calibration_sequences", type=numbers, metavar="3,7-9")
CALIBRATION_FROM = analysis("--calibration-from", type=click.Path(), metavar="FILE")
AGAIN = analysis("--again", is_flag=True)
NO_CACHE = click.option(
    "--no-cache",
    is_flag=True,
    help="Do not keep the exact answers, nor what methods learn, beside the trace; later runs "
    "compute them again.",
)

PLANS = click.option(
    "--plan",
    "plans",
    type=click.Path(dir_okay=False),
    multiple=True,
    metavar="FILE",
    help="A method and budget for every kv head, as `retrace recommend --out FILE` writes it; may "
    "be repeated.",
)
NO_PLOTS = click.option("--no-plots", is_flag=True, help="Draw no plots.")
PLOT_FORMAT = click.option(
    "--plot-format",
    type=click.Choice(["png", "svg", "pdf"]),
    multiple=True,
    default=("png",),
    help="Format of the plots: png (the default), or svg or pdf for papers; may be repeated.",
)
LOOSE_METHODS = click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="FILE.py:NAME",
    help="A file of a method that was replayed or in the loop: it is run only where it is named. "
    "May be repeated.",
)
"""Of the commands that read from data which methods there were."""
