"""Does replay predict what a method costs the model? Correlations of the two, over many points.

    python -m benchmarks.science.prediction --trace w.zarr --out docs/does-replay-predict.md

Every method runs in the loop at every budget (`retrace evaluate`) on the tokens of an exact trace,
and its loss of likelihood is held against what replay says of it on that trace. Correlations have
bootstrap intervals in which whole methods are drawn, since the budgets of one method are not
independent. Points are kept in `--results`, so that a run that was cut short goes on.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from retrace.capture import Evaluation, evaluate
from retrace.capture.tables.plot import LEAST, loss_by_replay
from retrace.traces import open_trace

METHODS = (
    "exact",
    "window",
    "h2o",
    "snapkv",
    "quest",
    "arkvale",
    "sparq",
    "loki",
)
BUDGETS = (16, 32, 64, 128, 256)
RESAMPLES = 2000
Figure = Callable[[pd.DataFrame], "pd.Series[float]"]
Statistic = Callable[[pd.DataFrame, Figure], float]
PREDICTORS: dict[str, Figure] = {
    "error norm": lambda points: points["error_norm"],
    "attention mass lost": lambda points: 1 - points["attention_fraction"],
    "keys missed (1 - recall)": lambda points: 1 - points["recall"],
    "bytes not read": lambda points: 1 - points["bytes_ratio"],
}


def main() -> None:
    """Run what is missing, and write the page with its picture."""
    arguments = _arguments()
    evaluation = evaluate(
        arguments.trace,
        arguments.methods,
        arguments.topk,
        out=arguments.results,
        device=arguments.device,
        progress=lambda what, done, total: print(f"\r{what} {done}/{total}", end="", flush=True),
    )
    print()
    points = evaluation.points
    points = points[points["method"].isin(arguments.methods) & points["topk"].isin(arguments.topk)]
    page = _page(arguments, points, evaluation.facts["calibration"])
    if arguments.out is None:
        print(page)
        return
    arguments.out.write_text(page, encoding="utf-8")
    shown = Evaluation(points, evaluation.facts)
    loss_by_replay(shown).savefig(arguments.out.with_suffix(".png"), dpi=110)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--topk", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=Path("results/prediction"))
    parser.add_argument("--out", type=Path, help="write the page to this file, a picture beside it")
    return parser.parse_args()


def spearman(points: pd.DataFrame, figure: Figure) -> float:
    """Of ranks: whether the loss grows with the figure, however."""
    return float(stats.spearmanr(figure(points), points["difference"]).statistic)


def pearson(points: pd.DataFrame, figure: Figure) -> float:
    """Of the figures themselves."""
    return float(stats.pearsonr(figure(points), points["difference"]).statistic)


def log_pearson(points: pd.DataFrame, figure: Figure) -> float:
    """Of their logarithms, since losses span orders of magnitude."""
    x, y = (np.log(column.clip(lower=LEAST)) for column in (figure(points), points["difference"]))
    return float(stats.pearsonr(x, y).statistic)


def within_a_budget(points: pd.DataFrame, figure: Figure) -> float:
    """The mean over budgets of the rank correlation between methods at the same budget."""
    return float(np.nanmean([spearman(rows, figure) for _, rows in points.groupby("topk")]))


def interval(points: pd.DataFrame, figure: Figure, statistic: Statistic) -> tuple[float, float]:
    """A 95 % interval of a statistic of points, whole methods being drawn with replacement."""
    generator = np.random.default_rng(0)
    parts = [rows for _, rows in points.groupby("method", sort=False)]
    found = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(parts), size=len(parts))
        if len(set(drawn)) > 1:
            found.append(statistic(pd.concat([parts[i] for i in drawn]), figure))
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)


def right_choices(points: pd.DataFrame, figure: Figure) -> tuple[float, int]:
    """Of two points whose losses differ beyond both intervals: how often the one that replay
    prefers loses less, and how many such pairs there are."""
    x, right, pairs = figure(points), 0, 0
    for i, j in itertools.combinations(range(len(points)), 2):
        one, other = points.iloc[i], points.iloc[j]
        if one["low"] > other["high"] or other["low"] > one["high"]:
            pairs += 1
            right += (x.iloc[i] - x.iloc[j]) * (one["difference"] - other["difference"]) > 0
    return right / pairs if pairs else float("nan"), pairs


def _page(arguments: argparse.Namespace, points: pd.DataFrame, held_out: Sequence[int]) -> str:
    trace = open_trace(arguments.trace)
    lengths = [trace.length(s) for s in trace.sequences]
    exact = float(points["exact_perplexity"].iloc[0])
    lines = [
        "# Does replay predict the closed loop?",
        "",
        "Replay judges each layer alone, with the queries, keys and values of the exact model. In "
        "use, errors of lower layers reach the upper ones. Here each method runs in the loop, in "
        "every layer and for every query, and its loss of likelihood is held against replay's "
        "figures for the same method, budget and queries: means over queries, heads and layers.",
        "",
        f"{trace.attributes['model']['pretrained']}, "
        f"{', '.join(task['task'] for task in trace.attributes['task'])}, {len(lengths)} sequences "
        f"of up to {max(lengths):,} tokens in {trace.attributes['dtype']}, of which methods learn "
        f"from {len(held_out)} and the others are evaluated; exact perplexity {exact:.2f}. "
        f"{points['method'].nunique()} methods at budgets of "
        f"{', '.join(map(str, sorted(points['topk'].unique())))} keys: {len(points)} points.",
        "",
        f"![Loss over replay's figures]({arguments.out.with_suffix('.png').name})"
        if arguments.out
        else "",
        "",
        "## Correlation with the loss of likelihood",
        "",
        "With 95 % intervals in which whole methods are drawn. *Within a budget* is the mean over "
        "budgets of the rank correlation between methods that have the same one. *Right choices*: "
        "of two points whose losses differ beyond their intervals over sequences, how often the "
        "one that replay prefers loses less.",
        "",
        "| Replay's figure | Spearman | Pearson | Pearson of logarithms | Within a budget | Right "
        "choices |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, figure in PREDICTORS.items():
        cells = [name]
        for statistic in (spearman, pearson, log_pearson, within_a_budget):
            low, high = interval(points, figure, statistic)
            cells.append(f"{statistic(points, figure):.2f} ({low:.2f} to {high:.2f})")
        share, pairs = right_choices(points, figure)
        cells.append(f"{share:.0%} of {pairs:,}" if pairs else "no pair is certain")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## What it means", "", _meaning(points)]
    lines += ["", "## Every point", "", "Loss in nats per token, and in brackets the error norm."]
    budgets = sorted(points["topk"].unique())
    lines += ["", f"| Method | {' | '.join(f'{k} keys' for k in budgets)} |"]
    lines.append("| --- |" + " --- |" * len(budgets))
    for method, rows in points.groupby("method", sort=False):
        cells = [
            f"{row.difference:+.3f} ({row.error_norm:.3f})"
            for row in rows.sort_values("topk").itertuples()
        ]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _meaning(points: pd.DataFrame) -> str:
    """What a user may take from the correlations, and where replay is farthest off."""
    best = max(PREDICTORS, key=lambda name: within_a_budget(points, PREDICTORS[name]))
    share, pairs = right_choices(points, PREDICTORS[best])
    spent = spearman(points, PREDICTORS["bytes not read"])
    certain = (
        f"It is right for {share:.0%} of the {pairs:,} pairs whose order in the loop is certain. "
        if pairs
        else "The order of no pair in the loop is certain. "
    )
    sentences = [
        f"The figure that orders methods of one budget best is {best}. {certain}Part of every "
        "correlation is the budget's, since whoever reads more loses less: bytes alone have a "
        f"rank correlation of {spent:.2f}. What replay adds is in the column *within a "
        "budget*, where intervals are wide: trust large differences, and run the few "
        "candidates that are left in the loop (`retrace evaluate`). Replay counts keys and "
        "mass where the inputs are exact, so that it says nothing of how errors add up over "
        f"layers. Farthest off, by ranks among all {len(points)} points, the first losing "
        "least:"
    ]
    for name in ("error norm", "attention mass lost"):
        ranks = stats.rankdata(PREDICTORS[name](points))
        losses = stats.rankdata(points["difference"])
        worst = np.argsort(-np.abs(ranks - losses), kind="stable")[:3]
        cases = [
            f"`{points.iloc[i]['method']}` at {points.iloc[i]['topk']} keys ({ranks[i]:.0f} by "
            f"replay, {losses[i]:.0f} in the loop)"
            for i in worst
        ]
        sentences.append(f"- by {name}: {', '.join(cases)};")
    sentences[-1] = sentences[-1].removesuffix(";") + "."
    return "\n\n".join([sentences[0], "\n".join(sentences[1:])])


if __name__ == "__main__":
    main()
