"""`retrace evaluate`: what methods in the loop cost a model, in likelihood or in tasks."""

import math
from pathlib import Path
from typing import Any

import click

from retrace.cli.command import Command
from retrace.cli.commands.capture import setting
from retrace.cli.config import CONFIG
from retrace.cli.parameters import (
    AGAIN,
    DEVICE,
    NO_PLOTS,
    PLANS,
    PLOT_FORMAT,
    ROWS_FORMAT,
    SPEC,
    names,
    numbers,
    text_or_mapping,
)
from retrace.cli.progress import progress_bars
from retrace.cli.screen import note, print_csv, print_json, print_table

TASK_OPTIONS = (
    "pretrained", "include_path", "num_fewshot", "limit", "max_length", "dtype", "model_args",
    "revision", "trust_remote_code",
)  # fmt: skip


@click.command(
    "evaluate",
    cls=Command,
    interrupted="Points that were finished are kept: the same command goes on from there.",
    epilog="""\b
Example:
  retrace evaluate traces/notes.zarr --method quest --method sparq --topk 16,64
  retrace evaluate traces/notes.zarr --method h2o --topk 64 --from-position 512
  retrace evaluate traces/notes.zarr --plan budgets.json
  retrace evaluate traces/notes.zarr --method xattention --topk 512 --protocol prefill:128
  retrace evaluate --pretrained Qwen/Qwen3-8B --tasks hellaswag --limit 99 --method h2o --topk 9""",
)
@click.argument("exact", type=click.Path(), required=False)
@click.option(
    "--method",
    type=SPEC,
    multiple=True,
    help="Method to put in the loop, such as quest:page=32; may be repeated.",
)
@PLANS
@click.option(
    "--topk",
    type=numbers,
    default=(),
    metavar="16,64,256",
    help="Budgets: keys per query and head.",
)
@setting("--protocol", metavar="prefill:B")
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
    "--tasks",
    type=names,
    default=(),
    metavar="NAME,...",
    help="Tasks of lm-eval-harness, such as hellaswag, to score the model in.",
)
@setting("--pretrained", metavar="MODEL")
@setting("--include-path", type=click.Path(), metavar="FOLDER")
@setting("--num-fewshot", type=int, metavar="N")
@click.option("--limit", type=int, metavar="N", help="Documents of each task; all by default.")
@click.option(
    "--max-length",
    type=int,
    metavar="N",
    help="Positions that the model reads of a task's texts at most; by default its own maximum.",
)
@setting("--dtype", metavar="NAME")
@setting("--model-args", type=text_or_mapping, metavar="KEY=VALUE,...")
@setting("--revision", metavar="NAME")
@setting("--trust-remote-code", is_flag=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder for the results; results/<EXACT>-evaluation, or results/<MODEL>-tasks, by "
    "default. Points that it holds already are not run again, unless the code that they come from "
    "changed.",
)
@DEVICE
@setting("--device-map", type=text_or_mapping, metavar="auto|balanced|sequential|cpu|JSON")
@AGAIN
@click.option("--overwrite", is_flag=True, help="Throw away the results that --out holds.")
@ROWS_FORMAT
@NO_PLOTS
@PLOT_FORMAT
@CONFIG
def command(
    exact: str | None,
    method: tuple[str, ...],
    plans: tuple[str, ...],
    topk: tuple[int, ...],
    tasks: tuple[str, ...],
    out: Path | None,
    format: str,
    no_plots: bool,
    plot_format: tuple[str, ...],
    **settings: Any,
) -> None:
    """Run a model with each method and budget in place of exact attention.

    Over the tokens of the trace EXACT: perplexity, the loss of likelihood with an interval over
    sequences, the divergence of next tokens, and beside them what replay says of the method on the
    trace. With --tasks: what the model scores in them, and its difference from exact attention with
    an interval over documents; there EXACT names the model in place of --pretrained, and is what
    methods that learn do so from.
    """
    method = (*method, *(f"plan:{file}" for file in plans))
    if not method:
        raise click.UsageError("Name a method (--method) and a budget (--topk), or a plan.")
    given = {name: value for name, value in settings.items() if value is not None}
    if tasks:
        if given.pop("protocol", None) is not None:
            raise click.UsageError("--protocol is for the tokens of a trace: leave out --tasks.")
        _evaluate_tasks(exact, method, topk, tasks, out, format, given)
        return
    for name in TASK_OPTIONS:
        if given.pop(name, False):
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag} is for tasks: name them with --tasks.")
    if exact is None:
        raise click.UsageError("Name a trace (EXACT), or tasks (--tasks) and a model.")
    drawn = () if no_plots else plot_format
    _evaluate_trace(exact, method, topk, out, format, drawn, given)


def _evaluate_trace(
    exact: str,
    method: tuple[str, ...],
    topk: tuple[int, ...],
    out: Path | None,
    format: str,
    plot_format: tuple[str, ...],
    settings: dict[str, Any],
) -> None:
    from retrace.capture import evaluate
    from retrace.traces import locate
    from retrace.traces.storage.durable import within

    place = locate(exact)
    out = Path("results", f"{place.stem}-evaluation") if out is None else out
    pictures = within(out, "plots")
    with progress_bars() as progress:
        evaluation = evaluate(place, method, topk, out=out, progress=progress, **settings)
    rows = evaluation.points.to_dict("records")
    if format == "json":
        print_json(rows)
    elif format == "csv":
        print_csv(rows)
    else:
        _print(rows, evaluation.facts["counted_from"], format)
    note(f"Results: {out}")
    if plot_format:
        from retrace.capture.tables.plot import draw_evaluation

        for plot in draw_evaluation(evaluation, pictures, plot_format):
            note(f"Plot: {plot}")


def _evaluate_tasks(
    exact: str | None,
    method: tuple[str, ...],
    topk: tuple[int, ...],
    tasks: tuple[str, ...],
    out: Path | None,
    format: str,
    settings: dict[str, Any],
) -> None:
    from retrace.capture import evaluate_tasks
    from retrace.traces import locate

    model = settings.get("pretrained", "") if exact is None else locate(exact).stem
    name = Path(model.removeprefix("builtin:")).name.removesuffix(".gguf")
    out = Path("results", f"{name}-tasks") if out is None else out
    with progress_bars() as progress:
        evaluation = evaluate_tasks(
            method, topk, tasks=tasks, exact=exact, out=out, progress=progress, **settings
        )
    rows = evaluation.table().to_dict("records")
    if format == "json":
        print_json(rows)
    elif format == "csv":
        print_csv(rows)
    else:
        lines = [
            [
                f"{row['task']}, {row['metric']}",
                f"{row['method']}, {row['topk']}",
                f"{row['exact']:.4f}",
                f"{row['score']:.4f}",
                f"{row['difference']:+.4f}",
                "-" if math.isnan(row["low"]) else f"{row['low']:+.4f} to {row['high']:+.4f}",
                f"{row['documents']}" if row["documents"] else "-",
            ]
            for row in rows
        ]
        columns = ["Task, metric", "Method, top-k", "Exact attention", "Score", "Difference"]
        columns += ["95 % interval", "Documents"]
        title = "Scores with a method in the loop"
        print_table(columns, lines, title=title, left=columns[1:2], form=format)
    note(f"Results: {out}")


def _print(rows: list[dict[Any, Any]], first: int, form: str) -> None:
    from retrace.analyze.units.costs import NOT_CHARGED, SERVING_DTYPE

    lines = [
        [
            f"{row['method']}, {row['topk']}",
            f"{row['perplexity']:.2f}",
            f"{row['difference']:+.4f}",
            "-" if math.isnan(row["low"]) else f"{row['low']:+.4f} to {row['high']:+.4f}",
            f"{row['kl']:.4f}",
            *(f"{row[name]:.4f}" for name in ("error_norm", "attention_fraction", "recall")),
            f"{row['bytes_ratio']:.4f}" + ("" if row.get("charged", True) else f" ({NOT_CHARGED})"),
        ]
        for row in rows
    ]
    columns = ["Method, top-k", "Perplexity", "NLL difference", "95 % interval", "KL"]
    columns += ["Error norm", "Attention fraction", "Recall", "Bytes ratio"]
    part = f" from position {first} on" if first else ""
    title = (
        f"In the loop, and by replay{part} (exact perplexity {rows[0]['exact_perplexity']:.2f}; "
        f"bytes of a cache in {SERVING_DTYPE})"
    )
    print_table(columns, lines, title=title, form=form)
