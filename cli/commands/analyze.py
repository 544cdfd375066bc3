"""`retrace analyze`: replay methods against a trace and print what they come to."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrace.cli.command import Command
from retrace.cli.config import CONFIG
from retrace.cli.parameters import (
    AGAIN,
    CALIBRATION,
    CALIBRATION_FROM,
    DEVICE,
    LAYERS,
    NO_CACHE,
    NO_PLOTS,
    PLANS,
    PLOT_FORMAT,
    PROTOCOL,
    SCHEDULER,
    SPEC,
    WORKERS,
    analysis,
    least_position,
    numbers,
    one_of,
    shares,
)
from retrace.cli.progress import busy, progress_bar
from retrace.cli.screen import (
    default_format,
    note,
    plural,
    print_csv,
    print_facts,
    print_json,
    print_table,
    print_words,
    say,
    size,
)

if TYPE_CHECKING:
    import pandas as pd

    from retrace.analyze import Estimate, Results
    from retrace.traces import Location

MOST_TABLES = 12
"""Methods and budgets that have a table of their own on stdout, before the means of all."""


@click.command(
    "analyze",
    cls=Command,
    interrupted="Layers of sequences that were finished are kept: the same command goes on there.",
    epilog="""\b
Example:
  retrace analyze traces/pythia-70m-wikitext.zarr --method quest:page=32 --topk 10,50
  retrace analyze --method 'quest:page={8,16,32}' --topk 10,50
  retrace analyze --method exact --method ./mine.py:Mine --format json | jq '.[0]'
  retrace analyze --method exact --method quest --topk 16,64 --locality
  retrace analyze traces/other-text.zarr --plan budgets.json
  retrace analyze --method quest --method sparq --topk 16,64,256 --at-bytes 0.125,0.25""",
)
@click.argument("trace", type=click.Path(), required=False)
@click.option(
    "--method",
    type=SPEC,
    multiple=True,
    help="Method to replay, such as quest, quest:page=32 or ./mine.py:Mine; may be repeated; "
    "exact by default, unless there is a plan. `retrace methods` lists them; `all` is every one "
    "of them.",
)
@PLANS
@click.option(
    "--topk",
    type=numbers,
    default="10",
    show_default=True,
    metavar="10,20,50",
    help="Budgets: keys per query and head.",
)
@analysis("--out", type=click.Path(path_type=Path), metavar="FOLDER")
@PROTOCOL
@analysis("--min-context", type=least_position, metavar="POSITION|each")
@analysis("--where", metavar="PHASE|MARK")
@analysis("--evidence", metavar="MARK")
@LAYERS
@CALIBRATION
@CALIBRATION_FROM
@DEVICE
@WORKERS
@SCHEDULER
@analysis("--part", type=one_of, metavar="I/N")
@NO_CACHE
@AGAIN
@analysis("--overwrite", is_flag=True)
@click.option(
    "--format",
    type=click.Choice(["table", "markdown", "json", "csv"]),
    help="What to print on stdout: layers as a table or in Markdown, or every head and metric as "
    "JSON or CSV. By default table on a terminal, else markdown.",
)
@click.option(
    "--profile",
    is_flag=True,
    help="Say on stderr where the time went: reading, exact attention, and each method's building, "
    "search and metrics.",
)
@click.option(
    "--at-bytes",
    type=shares,
    metavar="0.125,0.25",
    help="Compare these methods where they read the same share of full attention's bytes: read off "
    "between their budgets, never beyond them. As JSON or CSV these figures stand in place of "
    "those at the budgets.",
)
@analysis("--locality", is_flag=True)
@analysis("--projected", is_flag=True)
@analysis("--skip-damaged", is_flag=True)
@NO_PLOTS
@PLOT_FORMAT
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what is left to do, what of the trace it reads, how many operations the exact pass "
    "takes and how long all of it, by a slice that is replayed; and do nothing.",
)
@CONFIG
def command(
    trace: str | None,
    method: tuple[str, ...],
    plans: tuple[str, ...],
    topk: tuple[int, ...],
    out: Path | None,
    format: str | None,
    profile: bool,
    no_plots: bool,
    plot_format: tuple[str, ...],
    part: tuple[int, int] | None,
    at_bytes: tuple[float, ...] | None,
    dry_run: bool,
    no_cache: bool,
    **settings: Any,
) -> None:
    """Replay methods against TRACE, without its model, and print how near they come.

    Without TRACE, the newest one here or in ./traces.
    """
    from retrace.analyze import analyze, estimate, parse_specs
    from retrace.traces import locate
    from retrace.traces.storage.durable import within

    method = (*method, *(f"plan:{file}" for file in plans)) or ("exact",)
    specs, every = parse_specs(method)
    place = newest_trace() if trace is None else locate(trace)
    out = Path("results", place.stem) if out is None else out
    settings["keep_exact"] = not no_cache
    if dry_run:
        if settings["executor"] is not None:
            raise click.UsageError(
                "--dry-run measures this machine and knows nothing of a cluster's: leave out "
                "--scheduler."
            )
        print_estimate(estimate(place, method, topk, out=out, part=part, **settings), format)
        return
    with progress_bar() as progress:
        results = analyze(
            place,
            method,
            topk,
            out=out,
            profile=profile,
            progress=progress,
            announce=note_plan,
            part=part,
            **settings,
        )
    if part is not None:
        note(f"Part {part[0]} of {part[1]} is in {out}: `retrace merge {out}` when all are.")
        return
    there = [name for name in map(str, specs) if name in results.methods()]
    budgets = {k for spec in specs if spec.name == "plan" for k in results.topk(str(spec))}
    form = format or default_format()
    if at_bytes is None or form not in ("json", "csv"):
        print_results(results, there, sorted({*topk, *budgets}), form)
    if at_bytes is not None:
        print_at_bytes(results, there, at_bytes, form)
    if profile:
        print_profile(results)
    note(f"Results: {out}")
    if not no_plots:
        with busy("Drawing"):
            plots = results.draw(within(out, "plots"), plot_format)
        note(f"Plots: {out / 'plots'} ({plural(len(plots), 'picture')})")
    _note_kept_answers(place)
    named = {str(spec) for spec in specs} - every
    if results.run["missing"] or not named <= set(there):
        click.get_current_context().exit(1)


def note_plan(cost: "Estimate") -> None:
    """Say on stderr what a run will take, before it does."""
    note(
        f"Plan: {plural(cost.tasks, 'layer')} of sequences, {plural(cost.units, 'kv head')}; reads "
        f"{size(cost.bytes)}; {cost.operations:,} operations of the exact pass; about "
        f"{cost.seconds:,.0f} s on {plural(cost.workers, 'worker')}."
    )


def print_estimate(cost: "Estimate", form: str | None) -> None:
    """Print what a run will take."""
    if form == "json":
        print_json(cost.to_json())
        return
    print_facts(
        [
            (
                "Left",
                f"{plural(cost.tasks, 'layer')} of sequences, {plural(cost.units, 'kv head')}",
            ),
            ("Reads", size(cost.bytes)),
            ("Exact pass", f"{cost.operations:,} operations"),
            ("Takes", f"about {cost.seconds:,.1f} s on {plural(cost.workers, 'worker')}"),
        ]
    )


def newest_trace() -> "Location":
    """The trace that was captured last, here or in ./traces."""
    from retrace.traces import find_traces

    found = find_traces(".")
    if not found:
        raise click.UsageError(
            "There is no trace here or in ./traces: name one, or make one with `retrace capture`."
        )
    note(f"Analyzing {found[-1]}, the newest trace here.")
    return found[-1]


def print_results(
    results: "Results", methods: Sequence[str], topk: Sequence[int], form: str
) -> None:
    """Print what these methods came to at these budgets; others that the folder holds are not
    asked for."""
    from retrace.analyze.units.costs import is_charged

    if form in ("json", "csv"):
        rows = results.metrics
        rows = rows[rows["method"].isin(list(methods)) & rows["topk"].isin(list(topk))]
        charged = {method: is_charged(results.run, method) for method in methods}
        rows = rows.assign(charged=rows["method"].map(charged))
        if form == "json":
            print_json(rows.to_dict("records"))
        else:
            say(rows.to_csv(index=False), nl=False)
        return
    pairs = [(method, k) for method in methods for k in topk if k in results.topk(method)]
    from retrace.analyze.outputs.locality import LOCALITY_TITLE
    from retrace.analyze.outputs.markdown import remarks
    from retrace.analyze.outputs.projected import PROJECTED_TITLE

    over = results.queries_words()
    for method, k in pairs if len(pairs) <= MOST_TABLES else ():
        table = results.layers(method, k)
        print_figures(f"{method}, top-k {k}", table, form, over[method, k])
    print_figures(results.summary_title(), results.summary(methods, topk), form)
    if not (moves := results.locality_summary(methods, topk)).empty:
        print_figures(LOCALITY_TITLE, moves, form)
    if not (errors := results.projected_summary(methods, topk)).empty:
        print_figures(PROJECTED_TITLE, errors, form)
    print_words(remarks(results.run))


def print_at_bytes(
    results: "Results", methods: Sequence[str], shares: Sequence[float], form: str
) -> None:
    """Print these methods where they read the same share of the bytes."""
    from retrace.analyze.outputs.equal_bytes import equal_bytes_title, outside_words

    if form in ("json", "csv"):
        rows = results.at_bytes(shares, methods=methods).to_dict("records")
        print_json(rows) if form == "json" else print_csv(rows)
        return
    say("")
    for share in shares:
        table = results.equal_bytes_summary(share, methods)
        if not table.empty:
            print_figures(equal_bytes_title(results, share), table, form)
        if words := outside_words(results, share, methods):
            print_words(f"At {share:.1%} of the bytes: {words}")


def print_figures(title: str, table: "pd.DataFrame", form: str, over: str = "") -> None:
    """Print a table of figures and words, as a table or in Markdown; `over` says which
    queries."""
    from retrace.analyze.outputs.markdown import markdown_table, sentence

    texts = table.map(lambda cell: cell if isinstance(cell, str) else f"{cell:.4f}")
    if form == "table":
        title = f"{title}, {over}" if over else title
        print_table(list(texts.columns), texts.to_numpy().tolist(), title=title)
        return
    say(f"### {title}\n")
    if over:
        say(f"{sentence(over)}\n")
    say(markdown_table(texts) + "\n")


def print_profile(results: "Results") -> None:
    """Say on stderr where the time of the newest run went."""
    table, run = results.profile(), results.run["history"][-1]
    rows = [
        [step, method, f"{seconds:.2f}", f"{of_wall:.1%}", f"{of_threads:.1%}"]
        for step, method, seconds, of_wall, of_threads in table.itertuples(index=False)
    ]
    title = (
        f"Where the {run['profile']['wall']:.1f} seconds of {run['when']} went "
        f"({plural(run['profile']['workers'], 'worker')}, {run['device']})"
    )
    print_table(list(table.columns), rows, title=title, left=["Method"], err=True)


def _note_kept_answers(trace: "Location") -> None:
    from retrace.analyze.exact.store import exact_answers

    folder = exact_answers(trace)
    held = 0 if folder is None else sum(f.stat().st_size for f in folder.rglob("*.npz"))
    if held:
        note(f"Exact answers, kept for later runs: {folder} ({size(held)}; may be deleted)")
