"""Methods of prefill at equal shares of the pairs: in replay, and in the loop.

    python -m benchmarks.science.prefill --trace t.zarr --out docs/prefill-measured.md

Every method runs in the loop (`retrace evaluate --protocol prefill:B`) on the tokens of an exact
trace with each share of the blocks that `--shares` names, and stands beside what replay says of it
in all layers. Points are kept in `--results`, so that a run that was cut short goes on.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from scipy import stats

from benchmarks.page import origin, parser, publish
from retrace.analyze import parse_specs
from retrace.capture import evaluate
from retrace.traces import Trace, open_trace

METHODS = {
    "block-oracle": "keep=sink:1+recent:1",
    "minference": "",
    "minference:pattern=vertical-slash": "",
    "flexprefill:block=64": "",
    "xattention:block=64": "keep=sink:1+recent:1",
    "spargeattn:similarity=-1": "keep=sink:1+recent:1",
    "subblock": "keep=sink:1+recent:1",
    "seerattention": "keep=sink:1+recent:1",
    "blocks:of=quest": "keep=sink:1+recent:1",
    "blocks:of=mean-page": "keep=sink:1+recent:1",
    "a-shape": "",
    "tri-shape": "",
    "random-blocks": "keep=sink:1+recent:1",
}
"""What each needs besides a budget to attend the first block and the own, which are a method's own
default where it says nothing."""
COLUMNS = {
    "compute_ratio": "Pairs",
    "attention_fraction": "Mass",
    "error_norm": "Error norm",
    "block_recall": "Block recall",
    "choice_ratio": "Choice",
    "difference": "Loss, nats a token",
    "kl": "KL divergence",
}


def main() -> None:
    """Run what is missing, and write the page."""
    options = parser(__doc__)
    options.add_argument("--trace", required=True)
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25, 0.5])
    options.add_argument("--rows", type=int, default=64, help="queries in a block")
    options.add_argument("--device", default="auto")
    options.add_argument("--results", type=Path, default=Path("results/prefill"))
    arguments = options.parse_args()
    trace = open_trace(arguments.trace)
    longest = max(trace.length(s) for s in trace.sequences)
    asked = [(method, share) for share in arguments.shares for method in arguments.methods]
    # Points name methods as retrace writes them, which need not be as they were asked for.
    parsed, _ = parse_specs([_spec(*pair) for pair in asked])
    specs = dict(zip(map(str, parsed), asked, strict=True))
    evaluation = evaluate(
        trace,
        list(specs),
        [longest],
        protocol=f"prefill:{arguments.rows}",
        device=arguments.device,
        out=arguments.results,
        progress=lambda what, done, total: print(f"\r{what} {done}/{total}", end="", flush=True),
    )
    print()
    points = evaluation.points
    points = points[points["method"].isin(list(specs))].copy()
    points["name"] = [specs[method][0] for method in points["method"]]
    points["share"] = [specs[method][1] for method in points["method"]]
    publish(page(trace, points, evaluation.facts["calibration"], arguments.rows), arguments.out)


def _spec(method: str, share: float) -> str:
    options = [f"budget=fraction:{share:g}", *filter(None, [METHODS[method]])]
    return f"{method}{',' if ':' in method else ':'}{','.join(options)}"


def page(trace: Trace, points: pd.DataFrame, held_out: Sequence[int], rows: int) -> str:
    """The tables, one for each share, the methods of most mass first."""
    lengths = [trace.length(s) for s in trace.sequences if s not in held_out]
    learnt = f"Sequences that methods learn from, apart from these: {len(held_out)}. "
    lines = [
        "# Prefill, measured",
        "",
        f"{trace.attributes['model']['pretrained']} in {trace.attributes['dtype']}, "
        f"{', '.join(task['task'] for task in trace.attributes['task'])}: {len(lengths)} sequences "
        f"of {min(lengths):,} to {max(lengths):,} tokens, `prefill:{rows}`, every query, all "
        f"layers. {learnt}The exact model's perplexity is "
        f"{points['exact_perplexity'].iloc[0]:.2f}. Made by {origin()}.",
        "",
        "Means over layers and heads. *Pairs* are those computed over those of full attention, "
        "*choice* the operations that choosing takes over those of full attention. The loss is "
        "that of the whole model with the method in every layer, with its 95 % interval over "
        "sequences. Definitions: [prefill.md](prefill.md).",
    ]
    for share, alike in points.groupby("share"):
        best = alike.sort_values("attention_fraction", ascending=False)
        lines += ["", f"## {share:g} of the blocks", ""]
        lines += [f"| Method | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
        for row in best.to_dict("records"):
            cells = [f"{row[c]:.3f}" for c in COLUMNS if c not in ("difference", "kl")]
            interval = f"({row['low']:.3f} to {row['high']:.3f})"
            cells += [f"{row['difference']:.3f} {interval}", f"{row['kl']:.3f}"]
            lines.append(f"| `{row['name']}` | {' | '.join(cells)} |")
    lines += ["", "## Does replay order them as the loop does?", ""]
    for name, figure in (
        ("mass lost", 1 - points["attention_fraction"]),
        ("error norm", points["error_norm"]),
        ("pairs left out", 1 - points["compute_ratio"]),
    ):
        whole = stats.spearmanr(figure, points["difference"]).statistic
        within = [
            stats.spearmanr(figure[alike.index], alike["difference"]).statistic
            for _, alike in points.groupby("share")
        ]
        each = ", ".join(f"{rank:.2f}" for rank in within)
        lines.append(
            f"- {name}: rank correlation with the loss {whole:.2f} over all {len(points)} points; "
            f"{each} within the shares, from the smallest on."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
