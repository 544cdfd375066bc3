"""`retrace merge`: put together what `retrace analyze --part` left."""

from pathlib import Path

import click

from retrace.cli.command import Command
from retrace.cli.parameters import LOOSE_METHODS, NO_PLOTS, PLOT_FORMAT
from retrace.cli.progress import busy
from retrace.cli.screen import note, plural, say


@click.command(
    "merge",
    cls=Command,
    epilog="""\b
Example:
  retrace analyze traces/t.zarr --method quest --topk 10 --part 1/2 --out results/t
  retrace analyze traces/t.zarr --method quest --topk 10 --part 2/2 --out results/t
  retrace merge results/t""",
)
@click.argument("folders", type=click.Path(path_type=Path), nargs=-1, required=True)
@LOOSE_METHODS
@NO_PLOTS
@PLOT_FORMAT
def command(
    folders: tuple[Path, ...],
    methods: tuple[str, ...],
    no_plots: bool,
    plot_format: tuple[str, ...],
) -> None:
    """Put the parts in FOLDERS together to the results of one run, in the first of them."""
    from retrace.analyze import merge
    from retrace.traces.storage.durable import within

    with busy("Merging"):
        results = merge(folders, methods=methods)
    say(folders[0])
    note(f"Results: {folders[0]} ({plural(len(results.methods()), 'method')})")
    if not no_plots:
        with busy("Drawing"):
            plots = results.draw(within(folders[0], "plots"), plot_format)
        note(f"Plots: {folders[0] / 'plots'} ({plural(len(plots), 'picture')})")
