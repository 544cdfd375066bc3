"""`retrace sweep`: `retrace analyze` of what a file says, under the name that one looks for."""

import click

from retrace.cli.command import Command
from retrace.cli.commands.analyze import command as analyze
from retrace.cli.config import FILE

TRACE = click.Argument(["trace"], type=click.Path())

command = Command(
    "sweep",
    callback=analyze.callback,
    params=[
        TRACE,
        FILE,
        *(p for p in analyze.params if isinstance(p, click.Option) and p.name != FILE.name),
    ],
    interrupted=analyze.interrupted,
    help="""Replay the methods and budgets of FILE.yaml against TRACE, over one exact pass.

    It is `retrace analyze TRACE --config FILE.yaml`. In the file a list of values stands for a
    method with each of them, several lists for each combination; its other lines are options, and
    flags are stronger. What the results hold already is not computed again: a sweep that was
    interrupted, or whose file has grown, goes on with the same command.""",
    epilog="""\b
Example:
  retrace sweep traces/pythia-70m-wikitext.zarr sweep.yaml
  retrace sweep traces/pythia-70m-wikitext.zarr sweep.yaml --dry-run

\b
  # sweep.yaml
  topk: [10, 50]
  method:
    - exact
    - quest: {page: [8, 16, 32], pool: [none, sum]}""",
)
"""The command, with the function and the options of `analyze`."""
