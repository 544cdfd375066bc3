"""`retrace verify`: whether a trace is as it was written."""

from typing import TYPE_CHECKING

import click

from retrace.cli.command import Command
from retrace.cli.parameters import FORMAT
from retrace.cli.progress import progress_bar
from retrace.cli.screen import plural, print_facts, print_json, print_table, ranges, size

if TYPE_CHECKING:
    from retrace.traces import Verification


@click.command(
    "verify",
    cls=Command,
    epilog="""\b
Example:
  retrace verify traces/pythia-70m-wikitext.zarr
  retrace verify traces/pythia-70m-wikitext.zarr --format json | jq .sequences.whole""",
)
@click.argument("trace", type=click.Path())
@FORMAT
@click.pass_context
def command(ctx: click.Context, trace: str, format: str) -> None:
    """Read all of TRACE and name what is damaged, and what is whole.

    The exit code is 0 if all is whole, 1 if something is damaged.
    """
    from retrace.traces import verify_trace

    with progress_bar("Reading") as progress:
        found = verify_trace(trace, progress=progress)
    if format == "json":
        print_json(found.facts())
    else:
        _print(found)
    if not found.whole:
        ctx.exit(1)


def _print(found: "Verification") -> None:
    if found.damages:
        print_table(
            ["Layer", "Sequence", "Tensor", "Cause"],
            [
                [
                    "-" if damage.layer is None else str(damage.layer),
                    "all" if damage.sequence is None else str(damage.sequence),
                    damage.tensor,
                    damage.cause,
                ]
                for damage in found.damages
            ],
            left=("Tensor", "Cause"),
        )
    finished = len(found.finished)
    facts = [
        ("Trace", found.trace),
        ("Read", f"{plural(finished, 'sequence')} in {plural(len(found.layers), 'layer')}"),
        ("Whole", f"{size(found.bytes)} of queries, keys and values"),
        ("Sequences", _of(found.whole_sequences, finished)),
        ("Layers", _of(found.whole_layers, len(found.layers))),
    ]
    if finished < found.planned:
        facts.append(("Unfinished", f"{found.planned - finished} of {found.planned} sequences"))
    if found.damages:
        what = plural(len(found.damages), "array")
        facts.append(("Damaged", what))
        if found.whole_sequences:
            facts.append(("Next", "`retrace analyze --skip-damaged` goes on with what is whole"))
    print_facts(facts)


def _of(whole: tuple[int, ...], count: int) -> str:
    """What is whole, of how many."""
    if len(whole) == count:
        return f"all {count} whole" if count else "none"
    return f"{len(whole)} of {count} whole" + (f": {ranges(whole)}" if whole else "")
