"""`retrace copy`: a trace, or a slice of it, in another place."""

from typing import Any

import click

from retrace.cli.command import Command
from retrace.cli.parameters import numbers
from retrace.cli.progress import progress_bar
from retrace.cli.screen import note, plural, say, size


@click.command(
    "copy",
    cls=Command,
    interrupted="Sequences that were finished are kept: the same command with --resume (without "
    "--overwrite) goes on.",
    epilog="""\b
Example:
  retrace copy traces/llama.zarr traces/slice.zarr --layers 0,8-15 --queries last:256
  retrace copy s3://bucket/llama.zarr llama.zarr --sequences 0-3""",
)
@click.argument("trace", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--layers", type=numbers, metavar="0,2,5-8", help="Layers to copy.  [default: all recorded]"
)
@click.option(
    "--sequences", type=numbers, metavar="0,2,5-8", help="Sequences to copy.  [default: all]"
)
@click.option(
    "--queries",
    default="all",
    show_default=True,
    metavar="WHICH",
    help="Queries to keep of those that there are: all, last:N of each sequence, or stride:N. The "
    "last 64 of the prompt are kept besides, keys and values always whole.",
)
@click.option("--overwrite", is_flag=True, help="Replace the trace at OUT.")
@click.option("--resume", is_flag=True, help="Go on with a copy that was interrupted.")
def command(trace: str, out: str, **options: Any) -> None:
    """Copy TRACE, or some layers, sequences and queries of it, to OUT: paths or URLs.

    Layers keep their numbers, sequences are numbered from 0 on. Every checksum is tried on the way.
    """
    from retrace.traces import copy_trace

    with progress_bar("Copying") as progress:
        copied = copy_trace(trace, out, **options, progress=progress)
    say(copied.path)
    sequences, layers = len(copied.sequences), len(copied.layers)
    note(
        f"Copy: {copied.path} ({plural(sequences, 'sequence')}, {plural(layers, 'layer')}, "
        f"{size(copied.nbytes())})"
    )
