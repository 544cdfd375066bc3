"""`retrace export`: queries and keys for the benchmarks of vector indexes."""

from pathlib import Path
from typing import Any

import click

from retrace.cli.command import Command
from retrace.cli.commands.analyze import newest_trace
from retrace.cli.config import CONFIG
from retrace.cli.parameters import DEVICE, LAYERS, numbers
from retrace.cli.progress import progress_bar
from retrace.cli.screen import note, plural, say


@click.command(
    "export",
    cls=Command,
    epilog="""\b
Example:
  retrace export traces/notes.zarr --out vectors --layers 10 --kv-heads 0
  retrace export traces/notes.zarr --out vectors --format fvecs --causal --neighbors 10""",
)
@click.argument("trace", type=click.Path(), required=False)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="vectors",
    show_default=True,
    metavar="FOLDER",
    help="Where the files go; those of the same names are replaced.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["ann-benchmarks", "fvecs", "numpy"]),
    default="ann-benchmarks",
    show_default=True,
    help="HDF5 files that ann-benchmarks runs, keys padded to one norm; or folders of .fvecs and "
    ".ivecs, or of .npy files.",
)
@LAYERS
@click.option(
    "--kv-heads", type=numbers, metavar="0,2", help="Kv heads of each layer; all by default."
)
@click.option("--sequences", type=numbers, metavar="0,2-5", help="Sequences; all by default.")
@click.option(
    "--from-position",
    type=int,
    metavar="POSITION",
    help="Queries from here on, keys before; half of each sequence by default.",
)
@click.option(
    "--causal",
    is_flag=True,
    help="All keys of the sequence, of which each query may find those up to its own position: "
    "the dataset `seen` says how many, from `first_seen` on.",
)
@click.option(
    "--neighbors",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    metavar="N",
    help="Exact answers to each query.",
)
@DEVICE
@CONFIG
def command(trace: str | None, out: Path, form: str, **settings: Any) -> None:
    """Write the keys and queries of TRACE's heads, with exact answers by inner product.

    Without TRACE, of the newest one here or in ./traces.
    """
    from retrace.analyze.commands.export import export
    from retrace.traces import locate

    place = newest_trace() if trace is None else locate(trace)
    with progress_bar("Exporting") as progress:
        written = export(place, out, form, progress=progress, **settings)
    for file in written:
        say(file)
    note(f"Vectors: {out} ({plural(len(written), 'set')})")
