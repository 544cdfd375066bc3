"""`retrace evaluate`: what methods in the loop cost a model, beside what replay says of them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrace.cli.command import Command
from retrace.cli.config import CONFIG
from retrace.cli.parameters import DEVICE, FORMAT, numbers
from retrace.cli.screen import note, print_json, print_table

if TYPE_CHECKING:
    from retrace.capture.evaluation import Progress


@click.command(
    "evaluate",
    cls=Command,
    interrupted="Points that were finished are kept: the same command goes on from there.",
    epilog="""\b
Example:
  retrace evaluate traces/notes.zarr --method quest --method sparq --topk 16,64
  retrace evaluate traces/notes.zarr --method h2o --topk 64 --from-position 512""",
)
@click.argument("exact", type=click.Path())
@click.option(
    "--method",
    multiple=True,
    required=True,
    metavar="SPEC",
    help="Method to put in the loop, such as quest:page=32; may be repeated.",
)
@click.option(
    "--topk",
    type=numbers,
    required=True,
    metavar="16,64,256",
    help="Budgets: keys per query and head.",
)
@click.option(
    "--from-position",
    type=click.IntRange(min=1),
    metavar="P",
    help="Positions before it attend exactly; by default none do, or those that were not decoded.",
)
@click.option(
    "--dense-layers", type=numbers, default=(), metavar="0,1", help="Layers that attend exactly."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder for the results; results/<EXACT>-evaluation by default. Points that it holds "
    "already are not run again.",
)
@DEVICE
@click.option("--overwrite", is_flag=True, help="Throw away the results that --out holds.")
@FORMAT
@click.option("--no-plots", is_flag=True, help="Draw no plot.")
@CONFIG
def command(
    exact: str,
    method: tuple[str, ...],
    topk: tuple[int, ...],
    out: Path | None,
    format: str,
    no_plots: bool,
    **settings: Any,
) -> None:
    """Run the model of the trace EXACT with each method and budget in place of exact attention.

    For each: perplexity, the loss of likelihood with an interval over sequences, the divergence of
    next tokens, and beside them what replay says of the method on the exact trace.
    """
    from retrace.capture import evaluate
    from retrace.traces import locate

    place = locate(exact)
    out = Path("results", f"{place.stem}-evaluation") if out is None else out
    with _progress_bar() as progress:
        evaluation = evaluate(place, method, topk, out=out, progress=progress, **settings)
    rows = evaluation.points.to_dict("records")
    if format == "json":
        print_json(rows)
    else:
        _print(rows)
    note(f"Results: {out}")
    if not no_plots:
        from retrace.capture.evaluation_plot import draw_evaluation

        note(f"Plot: {draw_evaluation(evaluation, out / 'plots')}")


def _print(rows: list[dict[Any, Any]]) -> None:
    lines = [
        [
            f"{row['method']}, {row['topk']}",
            f"{row['perplexity']:.2f}",
            f"{row['difference']:+.4f}",
            "-" if math.isnan(row["low"]) else f"{row['low']:+.4f} to {row['high']:+.4f}",
            f"{row['kl']:.4f}",
            *(f"{row[name]:.4f}" for name in ("error_norm", "attention_fraction", "recall")),
            f"{row['bytes_ratio']:.4f}",
        ]
        for row in rows
    ]
    columns = ["Method, top-k", "Perplexity", "NLL difference", "95 % interval", "KL"]
    columns += ["Error norm", "Attention fraction", "Recall", "Bytes ratio"]
    title = f"In the loop, and by replay (exact perplexity {rows[0]['exact_perplexity']:.2f})"
    print_table(columns, lines, title=title)


@contextmanager
def _progress_bar() -> Iterator["Progress"]:
    """Shows how far it is, on stderr; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        rows: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in rows:
                rows[what] = bar.add_task(what)
            bar.update(rows[what], completed=done, total=total)

        yield show
