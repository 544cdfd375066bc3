"""Figures in words: the summary, and every table as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from retrace.analyze.metrics.registry import BY_NAME, SUMMARY, WITH_INTERVAL
from retrace.analyze.outputs.locality import LOCALITY_TITLE, locality_summary
from retrace.analyze.outputs.projected import PROJECTED_TITLE, projected_summary
from retrace.analyze.outputs.shown import shown
from retrace.analyze.tables.figures import Figures
from retrace.analyze.units.costs import NOT_CHARGED, is_charged, serving_words

TITLE = "Means over layers and heads"
PREDICTS = (
    "The attention fraction predicts what a method costs the model better than the error norm, "
    "which can be smallest where the model is worst (docs/does-replay-predict.md)."
)
"""What to judge methods by, where the figures stand."""
AGAINST_FULL = (
    "The model attends to keys of its own choice: figures are against full attention, which it "
    "does not compute itself (docs/natively-sparse.md)."
)
"""What they are measured against, likewise, of a natively sparse model."""
OF_PLANS = "The top-k of a plan is its largest: each kv head has a method and budget of its own."
"""What the budget is that stands beside a plan."""


def remarks(*runs: Mapping[str, Any]) -> str:
    """What is said where figures of these runs stand."""
    against = [AGAINST_FULL] if any(run.get("natively_sparse") for run in runs) else []
    planned = any(entry.get("name") == "plan" for run in runs for entry in _methods(run))
    return " ".join([PREDICTS, *against, *([OF_PLANS] if planned else [])])


def _methods(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    held = run.get("methods", {})
    return [entry for entry in held.values() if isinstance(entry, Mapping)]


def summary(
    figures: Figures, methods: Sequence[str] | None = None, topk: Sequence[int] | None = None
) -> pd.DataFrame:
    """Means over layers and heads, a line for each method and budget (all if None), in words:
    figures, of which some have their 95 % interval over sequences in brackets."""
    rows = figures.metrics
    rows = rows if methods is None else rows[rows["method"].isin(list(methods))]
    rows = rows if topk is None else rows[rows["topk"].isin(list(topk))]
    means = rows.pivot_table("mean", ["method", "topk"], "metric")
    known = figures.intervals("model", methods=methods, topk=topk, metrics=WITH_INTERVAL)
    ends = _brackets(known, ["method", "topk", "metric"])
    names = [name for name in SUMMARY if name in means]  # earlier results have fewer
    numbers = figures.numbers()

    def beside(name: str, method: str, k: int) -> str:
        if name == "bytes_ratio" and not is_charged(figures.run, method):
            return f"({NOT_CHARGED})"
        return ends.get((method, k, name), "")

    lines = [
        [f"{method}, {k}", numbers[method, k]]
        + [f"{means[name][(method, k)]:.4f} {beside(name, method, k)}".strip() for name in names]
        for method in methods or figures.methods()
        for k in figures.topk(method)
        if (method, k) in means.index
    ]
    titles = [BY_NAME[name].title.title() for name in names]
    return pd.DataFrame(lines, columns=["Method, top-k", "Queries", *titles])


def summary_title(figures: Figures) -> str:
    """What a summary shows, and what its brackets are."""
    sequences = figures.sequences["sequence"].nunique()
    if sequences > 1:
        brackets = f"in brackets 95 % intervals over {sequences} sequences"
    elif sequences == 1:
        brackets = "no intervals, which take more than one sequence"
    else:
        return TITLE
    return f"{TITLE} ({brackets}; bytes {serving_words(figures.run)})"


def markdown(figures: Figures) -> str:
    """The summary and the table of every method and budget, as Markdown; layers with the 95 %
    intervals of their means over sequences, where there are several."""
    parts = []
    if outdated := figures.run.get("outdated"):
        parts.append(f"Figures of other code than the rest: {', '.join(outdated)}.\n")
    means = markdown_table(summary(figures))
    parts.append(f"### {summary_title(figures)}\n\n{means}\n\n{remarks(figures.run)}\n")
    if not (moves := locality_summary(figures.locality)).empty:
        parts.append(f"### {LOCALITY_TITLE}\n\n{markdown_table(moves)}\n")
    if not (errors := projected_summary(figures.projected)).empty:
        parts.append(f"### {PROJECTED_TITLE}\n\n{markdown_table(errors)}\n")
    shown_by_layer = ("recall", "error_norm")
    known = figures.intervals("layer", metrics=shown_by_layer)
    ends = _brackets(known, ["method", "topk", "metric", "module"])
    tables = dict(iter(figures.table().groupby(["Method", "Top-k"], sort=False)))
    over, medians = figures.queries_words(), figures.layer_medians()
    for method in figures.methods():
        for k in figures.topk(method):
            table = tables[method, k].drop(columns=["Method", "Top-k"])
            if (method, k) in medians:
                table["Median Error Norm"] = table["Layer"].map(medians[method, k])
            for metric in shown_by_layer if ends else ():
                table[f"95 % of Mean {metric.replace('_', ' ').title()}"] = [
                    ends.get((method, k, metric, module), "") for module in table["Layer"]
                ]
            words = sentence(over[method, k])
            parts.append(f"### {method}, top-k {k}\n\n{words}\n\n{markdown_table(table)}\n")
    return shown("\n".join(parts))


def _brackets(known: pd.DataFrame, keys: list[str]) -> dict[tuple[Any, ...], str]:
    """The intervals that there are as they stand in a table, by the columns that name them."""
    found = known.dropna(subset=["low", "high"])
    places = zip(*(found[key] for key in keys), strict=True)
    return {
        place: f"[{low:.4f}, {high:.4f}]"
        for place, low, high in zip(places, found["low"], found["high"], strict=True)
    }


def sentence(words: str) -> str:
    """Words as a sentence, names in them as they are.

    >>> sentence("over 24 queries of each head, in Needle-2")
    'Over 24 queries of each head, in Needle-2.'
    """
    return f"{words[:1].upper()}{words[1:]}."


def markdown_table(table: pd.DataFrame) -> str:
    """A pipe table; figures with four significant digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else shown(" ".join(str(value).split()))

    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [[cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
