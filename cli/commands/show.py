"""`retrace show`: one query, its best keys, and which of them methods take and miss."""

from typing import TYPE_CHECKING, Any

import click

from retrace.cli.command import Command
from retrace.cli.parameters import CALIBRATION, CALIBRATION_FROM, DEVICE, PROTOCOL, SPEC
from retrace.cli.progress import busy
from retrace.cli.screen import note, on_terminal, print_facts, print_json, print_table, say

if TYPE_CHECKING:
    import pandas as pd

    from retrace.analyze import OneQuery
    from retrace.analyze.commands.show import Texts
    from retrace.traces import Trace


@click.command(
    "show",
    cls=Command,
    epilog="""\b
Example:
  retrace show traces/smollm2-topics.zarr --layer 20 --head 2 --position 900 --method quest
  retrace show t.zarr --layer 3 --head 0 --sequence 4 --position 3718 --topk 64 --format csv""",
)
@click.argument("trace", type=click.Path())
@click.option("--layer", type=int, required=True, metavar="L", help="Layer of the model.")
@click.option("--head", type=int, required=True, metavar="H", help="Query head of the layer.")
@click.option(
    "--position", type=int, required=True, metavar="P", help="Position of the query, from 0."
)
@click.option(
    "--sequence",
    type=int,
    metavar="S",
    help="Sequence of the trace; by default the first that no method learns from.",
)
@click.option(
    "--method",
    type=SPEC,
    multiple=True,
    default=("exact",),
    help="Method to ask, as `retrace analyze` names it; may be repeated; exact by default.",
)
@click.option(
    "--topk",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    metavar="K",
    help="Budget: keys per query, and how many of the best are listed.",
)
@PROTOCOL
@CALIBRATION
@CALIBRATION_FROM
@DEVICE
@click.option(
    "--format",
    type=click.Choice(["table", "markdown", "json", "csv"]),
    help="What to print on stdout: tables, or in Markdown; everything as JSON, or a line for each "
    "method and key as CSV. By default table on a terminal, else markdown.",
)
def command(
    trace: str, method: tuple[str, ...], topk: int, format: str | None, **settings: Any
) -> None:
    """Show one query of TRACE: the tokens before it, the keys that it attends to most, and which of
    them each method takes and misses.

    Figures are those that the query has in `retrace analyze`.
    """
    from retrace.analyze import show
    from retrace.traces import open_trace

    opened = open_trace(trace)
    with busy("Reading the tokenizer"):
        texts = texts_of(opened)
    found = show(opened, method, topk, texts=texts, **settings)
    if format == "json":
        print_json(found.to_json())
    elif format == "csv":
        say(found.table().to_csv(index=False), nl=False)
    else:
        _print(found, format or ("table" if on_terminal() else "markdown"))


def texts_of(trace: "Trace") -> "Texts | None":
    """What gives the texts of a trace's tokens; None, and a note why, where nothing does."""
    from retrace.capture import token_texts
    from retrace.traces import RetraceError

    try:
        return token_texts(trace)
    except RetraceError as error:
        note(f"Tokens are shown by their ids: {error}")
        return None


def _print(query: "OneQuery", form: str) -> None:
    seen = " ".join(query.tokens["token"].map(str))
    if text := "".join(query.tokens["text"]):
        seen = repr(text)[1:-1]
    print_facts(
        [
            ("Layer", f"{query.layer} ({query.module})"),
            ("Head", f"{query.head} (kv head {query.kv_head})"),
            ("Query", f"sequence {query.sequence}, position {query.position}"),
            ("Sees", f"{query.visible:,} keys"),
            ("Up to it", seen),
        ]
    )
    say("")
    best = query.best()
    methods = list(query.figures["method"])
    shown = best[["rank", "key", "probability"]].rename(
        columns={"rank": "Rank", "key": "Key", "probability": "Probability"}
    )
    shown.insert(2, "Token", [_words(*row) for row in _tokens(best)])
    for method in methods:
        shown[method] = best[method].map({True: "taken", False: "missed"})
    _print_rows(f"The {len(best)} keys of most attention", shown, form, ["Token"])
    titles = {name: name.replace("_", " ").capitalize() for name in query.figures.columns}
    figures = query.figures.rename(columns=titles)
    _print_rows(f"What each method takes, top-k {query.topk}", figures, form)


def _tokens(best: "pd.DataFrame") -> "list[tuple[int, str, str]]":
    return [*zip(best["token"], best["text"], best["around"], strict=True)]


def _words(token: int, text: str, around: str) -> str:
    """A key's token, among those around it."""
    return f"{text!r} in {around!r}" if text else str(token)


def _print_rows(
    title: str, rows: "pd.DataFrame", form: str, left: "list[str] | None" = None
) -> None:
    from retrace.analyze.outputs.markdown import markdown_table

    texts = rows.map(lambda cell: f"{cell:.4f}" if isinstance(cell, float) else str(cell))
    if form == "table":
        print_table(list(texts.columns), texts.to_numpy().tolist(), title=title, left=left or [])
        return
    say(f"### {title}\n")
    say(markdown_table(texts.map(lambda cell: cell.replace("|", "\\|"))) + "\n")
