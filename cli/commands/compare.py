"""`retrace compare`: how far runs with a method in the loop drift from the exact run."""

import math
from pathlib import Path
from typing import Any

import click

from retrace.cli.command import Command
from retrace.cli.parameters import (
    DEVICE,
    LAYERS,
    LOOSE_METHODS,
    NO_PLOTS,
    PLOT_FORMAT,
    ROWS_FORMAT,
    SCHEDULER,
    WORKERS,
)
from retrace.cli.progress import busy, progress_bar
from retrace.cli.screen import note, plural, print_csv, print_json, print_table


@click.command(
    "compare",
    cls=Command,
    epilog="""\b
Example:
  retrace capture --reference traces/notes.zarr --approximate quest --topk 64 --out quest.zarr
  retrace compare traces/notes.zarr quest.zarr""",
)
@click.argument("exact", type=click.Path())
@click.argument("approximate", type=click.Path(), nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder for the results; results/<EXACT>-drift by default.",
)
@LOOSE_METHODS
@LAYERS
@DEVICE
@WORKERS
@SCHEDULER
@ROWS_FORMAT
@NO_PLOTS
@PLOT_FORMAT
def command(
    exact: str,
    approximate: tuple[str, ...],
    out: Path | None,
    format: str,
    no_plots: bool,
    plot_format: tuple[str, ...],
    **settings: Any,
) -> None:
    """Compare runs of a model with a method in the loop (APPROXIMATE) with the EXACT run.

    For every layer: how far queries, keys, values and the attention output have drifted. For each
    run: perplexity, and what the method costs in likelihood with an interval over sequences. All
    are of the positions that the method answers, which --from-position was given the first of.
    """
    from retrace.analyze import Drift, compare
    from retrace.analyze.tables.drift import TENSORS
    from retrace.traces import locate
    from retrace.traces.storage.durable import within
    from retrace.traces.storage.lock import check_files, locked_folder

    place = locate(exact)
    out = Path("results", f"{place.stem}-drift") if out is None else out
    with locked_folder(out) as refusal:
        if refusal is not None:
            raise refusal
        pictures = within(out, "plots")
        check_files(out, Drift.files())
        with progress_bar("Comparing") as progress:
            runs = [locate(run) for run in approximate]
            drift = compare(place, runs, progress=progress, **settings)
        drift.save(out)
    if format == "json":
        print_json(
            {"runs": drift.runs.to_dict("records"), "layers": drift.table().to_dict("records")}
        )
    elif format == "csv":
        print_csv(drift.table().merge(drift.runs, on="run").to_dict("records"))
    else:
        for run, rows in drift.table().groupby("run", sort=False):
            figures = rows[list(TENSORS)].to_numpy()
            lines = [
                [module, *(f"{figure:.4f}" for figure in line)]
                for module, line in zip(rows["module"], figures, strict=True)
            ]
            columns = ["Layer", *map(str.title, TENSORS)]
            print_table(columns, lines, title=f"Drift: {run}", form=format)
        _print_runs(drift.runs.to_dict("records"), format)
    note(f"Results: {out}")
    if not no_plots:
        from retrace.analyze.outputs.plots.drift import draw_drift

        with busy("Drawing"):
            plots = draw_drift(drift, pictures, plot_format)
        note(f"Plots: {pictures} ({plural(len(plots), 'picture')})")
    if drift.missing:
        click.get_current_context().exit(1)


def _print_runs(runs: list[dict[Any, Any]], form: str) -> None:
    lines = [
        [
            run["run"],
            f"{run['exact_perplexity']:.2f}",
            f"{run['perplexity']:.2f}",
            f"{run['difference']:+.4f}",
            "-" if math.isnan(run["low"]) else f"{run['low']:+.4f} to {run['high']:+.4f}",
            f"{run['kl']:.4f}",
        ]
        for run in runs
    ]
    columns = ["Run", "Exact perplexity", "Perplexity", "NLL difference", "95 % interval", "KL"]
    print_table(columns, lines, title="Likelihood, in nats per token", form=form)
