"""`retrace traces`: the traces that are here."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrace.cli.command import Command
from retrace.cli.facts import model_name, task_names
from retrace.cli.parameters import ROWS_FORMAT
from retrace.cli.screen import note, print_csv, print_json, print_table, ranges, size

if TYPE_CHECKING:
    from retrace.traces import Location


@click.command(
    "traces",
    cls=Command,
    epilog="""\b
Example:
  retrace traces
  retrace traces /data/captures --format json""",
)
@click.argument("folder", type=click.Path(), default=".")
@ROWS_FORMAT
def command(folder: str, format: str) -> None:
    """List the traces in FOLDER and FOLDER/traces, the newest last; FOLDER is here by default."""
    from retrace.traces import DamageError, RetraceError, find_traces, locate

    place = locate(folder)
    if isinstance(place, Path) and not place.is_dir():
        raise RetraceError(f"There is no folder {folder}.")
    found = []
    for path in find_traces(place):
        try:
            found.append(_facts(path))
        except DamageError as error:  # the others are there all the same
            note(f"Warning: {error}")
    if format == "json":
        print_json(found)
        return
    if format == "csv":
        print_csv([one | _in_words(one) for one in found])
        return
    if not found:
        note(
            f"There is no trace in {folder} or its sub-folder traces; `retrace capture` makes one."
        )
        return
    print_table(
        ["Trace", "Model", "Task", "Layers", "Sequences", "Tokens", "Dtype", "Size"],
        [
            [
                fact["trace"],
                *_in_words(fact).values(),
                f"{fact['finished']}/{fact['planned']}",
                f"{fact['tokens']:,}",
                fact["dtype"],
                size(fact["bytes"]),
            ]
            for fact in found
        ],
        left=("Model", "Task", "Layers", "Dtype"),
        form=format,
    )


def _in_words(fact: dict[str, Any]) -> dict[str, str]:
    return {
        "model": model_name(fact),
        "task": task_names(fact),
        "layers": ranges(fact["layers"]),
    }


def _facts(path: "Location") -> dict[str, Any]:
    from retrace.traces import open_trace

    trace = open_trace(path)
    return {
        "trace": str(path),
        "model": trace.attributes.get("model"),
        "task": trace.attributes.get("task"),
        "layers": list(trace.layers),
        "finished": len(trace.sequences),
        "planned": trace.planned,
        "tokens": sum(trace.length(sequence) for sequence in trace.sequences),
        "dtype": trace.attributes["dtype"],
        "bytes": trace.nbytes(),
    }
