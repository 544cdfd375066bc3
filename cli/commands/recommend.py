"""`retrace recommend`: the cheapest method and budget of every head that meets a target."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrace.cli.command import Command
from retrace.cli.commands.analyze import newest_trace, print_figures
from retrace.cli.config import CONFIG
from retrace.cli.parameters import (
    CALIBRATION,
    CALIBRATION_FROM,
    DEVICE,
    LAYERS,
    NO_CACHE,
    PROTOCOL,
    SCHEDULER,
    SPEC,
    WORKERS,
    numbers,
)
from retrace.cli.progress import progress_bar
from retrace.cli.screen import default_format, note, print_facts, print_json, print_words, ranges

if TYPE_CHECKING:
    from retrace.analyze import Recommendation


@click.command(
    "recommend",
    cls=Command,
    interrupted="Exact answers that were finished are kept: the same command goes on from there.",
    epilog="""\b
Example:
  retrace recommend traces/notes.zarr --target attention_fraction=0.9 --method quest --method sparq
  retrace recommend --target bytes_ratio=0.2 --topk 16,64,256 --out budgets.json
  retrace recommend --target error_norm=0.2 --share layer --budgets layer --out backends.json""",
)
@click.argument("trace", type=click.Path(), required=False)
@click.option(
    "--target",
    required=True,
    metavar="METRIC=VALUE",
    help="What all heads must meet at the fewest bytes: attention_fraction=0.95, which tells best "
    "what the model will lose, error_norm=0.1 or recall=0.9; or bytes_ratio=0.2, for the least "
    "error within so many bytes.",
)
@click.option(
    "--method",
    "methods",
    type=SPEC,
    multiple=True,
    default=("window", "quest", "sparq"),
    show_default=True,
    help="Method to choose from, as in `retrace analyze`; may be repeated.",
)
@click.option(
    "--topk",
    type=numbers,
    default="16,32,64,128,256",
    show_default=True,
    metavar="16,32,64",
    help="Budgets to choose from: keys per query and head.",
)
@click.option(
    "--share",
    type=click.Choice(["head", "layer", "model"]),
    default="head",
    show_default=True,
    help="Which kv heads have one method: each its own, all of a layer, or all of the model, as a "
    "stack that serves it takes them.",
)
@click.option(
    "--budgets",
    type=click.Choice(["head", "layer"]),
    default="head",
    show_default=True,
    help="Which kv heads have one budget.",
)
@click.option(
    "--over",
    type=click.Choice(["head", "model"]),
    default="head",
    show_default=True,
    help="Whose figure meets the target: every head's, or the mean over the model's heads, at the "
    "least bytes of the whole.",
)
@click.option(
    "--fractions", is_flag=True, help="Write budgets as fractions of the context, for any length."
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE.json", help="Where to write it as JSON."
)
@PROTOCOL
@click.option(
    "--min-context",
    type=int,
    metavar="POSITION",
    help="First position whose query counts, for all budgets alike; half of the shortest sequence "
    "by default.",
)
@LAYERS
@CALIBRATION
@CALIBRATION_FROM
@DEVICE
@WORKERS
@SCHEDULER
@NO_CACHE
@click.option(
    "--format",
    type=click.Choice(["table", "markdown", "json"]),
    help="What to print on stdout. By default table on a terminal, else markdown.",
)
@CONFIG
def command(
    trace: str | None,
    target: str,
    out: Path | None,
    no_cache: bool,
    format: str | None,
    **settings: Any,
) -> None:
    """Choose the cheapest method and budget for every kv head of TRACE that meets a target.

    One half of the sequences choose, the other half verifies. With 95 % probability all heads meet
    the target on the half that verifies, under what the line `Assumes` says. Heads where nothing
    meets it keep full attention. Without TRACE, the newest one here or in ./traces.
    """
    from retrace.analyze import recommend
    from retrace.analyze.outputs.markdown import remarks
    from retrace.traces import locate
    from retrace.traces.storage.lock import locked_file

    place = newest_trace() if trace is None else locate(trace)
    with locked_file(out):  # refused before the work
        with progress_bar() as progress:
            found = recommend(place, target, progress=progress, keep_exact=not no_cache, **settings)
        if out is not None:
            found.save(out)
    form = format or default_format()
    if form == "json":
        print_json(found.to_json())
    else:
        title = f"{found.facts['target']['metric']} of each kv head's worst query head"
        print_figures(title, found.table(), form)
        print_facts(_in_words(found))
        print_words(remarks(found.facts))
    if out is not None:
        note(f"Written: {out}")


def _in_words(found: "Recommendation") -> list[tuple[str, str]]:
    """What the whole comes to."""
    from retrace.analyze.units.costs import serving_words

    facts = found.facts
    metric, mean = facts["target"]["metric"], facts["mean"]
    total, met = facts["heads"], facts["heads_met"]
    worst = facts["worst_head"]
    kept = int((found.kv_heads["method"] == "dense").sum())
    classes = found.heads["class"].value_counts()
    lines = [
        ("Target", f"{found.target}, {_whose(facts)}"),
        ("Assumes", facts["assumes"]),
        (
            "Chosen on",
            f"sequences {ranges(facts['choose'])}: {metric} {_figure(mean['choose'][metric])}, "
            f"bytes {mean['choose']['bytes_ratio']['mean']:.1%}",
        ),
        (
            "Verified on",
            f"sequences {ranges(facts['verify'])}: {metric} {_figure(mean['verify'][metric])}, "
            f"bytes {mean['verify']['bytes_ratio']['mean']:.1%}",
        ),
        (
            "Target met",
            f"in {met['verify']} of {total} heads on the half that verifies ({met['choose']} on "
            f"the other); worst: {worst[metric]:.4f}, layer {worst['layer']}, head {worst['head']}",
        ),
        (
            "Full attention",
            f"{kept} of {len(found.kv_heads)} kv heads, where nothing tried meets it",
        ),
        ("Bytes", f"over those of full attention, {serving_words(facts)}"),
        ("One setting", _one_setting(facts, metric)),
        ("Head classes", ", ".join(f"{n} {name}" for name, n in classes.items())),
    ]
    return [line for line in lines if line[0] != "Full attention" or kept]


def _whose(facts: dict[str, Any]) -> str:
    """Whose figure meets the target; and how near the choice is to the best of all."""
    known = facts["together"]
    if known is None:
        return "in every head"
    what = "error norm" if facts["target"]["metric"] == "bytes_ratio" else "bytes ratio"
    return (
        f"in the mean over all heads (bound {known['bound']:.4f}); of the settings tried no choice "
        f"that does has a {what} below {known['least']:.4f}"
    )


def _one_setting(facts: dict[str, Any], metric: str) -> str:
    """What the same for all heads costs, its mean meeting the target."""
    from retrace.analyze.units.costs import with_charge

    one = facts["one_setting"]
    if one is None:
        return "none tried meets it with its mean over all heads"
    verify = one["mean"]["verify"]
    return (
        f"for all heads, its mean meeting the target: {with_charge(facts, one['method'])}, top-k "
        f"{one['topk']}, bytes "
        f"{verify['bytes_ratio']['mean']:.1%}, {metric} {_figure(verify[metric])} when verified"
    )


def _figure(figure: dict[str, float | None]) -> str:
    low, high = figure["low"], figure["high"]
    interval = "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"
    return f"{figure['mean']:.4f}{interval}"
