"""`retrace report`: results as one page, to look at in a browser and to mail."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from retrace.cli.command import Command
from retrace.cli.progress import busy
from retrace.cli.screen import note, size

if TYPE_CHECKING:
    from retrace.analyze.commands.show import Texts
    from retrace.traces import Trace


@click.command(
    "report",
    cls=Command,
    epilog="""\b
Example:
  retrace report results/smollm2-topics --out report.html
  retrace report results/prose results/code --out both.html""",
)
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="report.html",
    show_default=True,
    metavar="FILE",
    help="The page; one that is there is replaced.",
)
def command(results: tuple[Path, ...], out: Path) -> None:
    """Make one page of RESULTS, folders that `retrace analyze` wrote, that needs no network.

    It shows every layer and head, curves over budgets, density and bytes, methods side by side, and
    tails. The worst queries are drawn where their trace is on this machine.
    """
    from retrace.analyze.commands.report import report

    with busy("Writing the page"):
        file = report(results, out, _texts_of)
    note(f"Report: {file} ({size(file.stat().st_size)})")


def _texts_of(trace: "Trace") -> "Texts":
    from retrace.capture import token_texts  # loads what reads models: only where it is wanted

    return token_texts(trace)
