"""`retrace calibrate`: let a method learn what it needs, ahead of replaying it."""

from pathlib import Path
from typing import Any

import click

from retrace.cli.command import Command
from retrace.cli.parameters import DEVICE, LAYERS, SCHEDULER, SPEC, WORKERS, numbers
from retrace.cli.progress import progress_bar
from retrace.cli.screen import note, plural, say


@click.command(
    "calibrate",
    cls=Command,
    interrupted="Layers that were finished are kept: the same command goes on from there.",
    epilog="""\b
Example:
  retrace calibrate traces/pythia-70m-wikitext.zarr loki
  retrace calibrate traces/pythia-70m-wikitext.zarr 'loki:rank={16,32}'
  retrace calibrate traces/pythia-70m-wikitext.zarr loki --out loki.npz
  retrace analyze traces/other.zarr --method loki --calibration-from loki.npz""",
)
@click.argument("trace", type=click.Path())
@click.argument("method", type=SPEC)
@click.option(
    "--sequences",
    type=numbers,
    metavar="3,7-9",
    help="Sequences to learn from; by default the last quarter, as analyze holds them out.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="One file besides, which --calibration-from takes on other traces of the same model; it "
    "is learnt from the last sequences, at most 8, if none are named.",
)
@LAYERS
@DEVICE
@WORKERS
@SCHEDULER
@click.option(
    "--again",
    is_flag=True,
    help="Learn anew what is kept, though nothing that it depends on is known to have changed.",
)
def command(trace: str, method: str, **settings: Any) -> None:
    """Let METHOD learn from some sequences of TRACE, and keep that beside it.

    `retrace analyze` does so by itself where it finds nothing.
    """
    from retrace.analyze import calibrate
    from retrace.traces import locate

    with progress_bar("Learning", "layers") as progress:
        files = calibrate(locate(trace), method, progress=progress, **settings)
    if settings["out"] is not None:
        say(files[0])
        return
    say(files[0].parent)
    note(f"Calibrated: {plural(len(files), 'file')}.")
