"""All methods at equal bytes: what each is worth for what it reads.

    python -m benchmarks.science.methods --trace t.zarr --out docs/equal-bytes.md

Replays every installed method with its defaults at the budgets of `--topk`, for queries that see at
least `--min-context` keys, in all layers, since some methods select in few of them for the others,
and interpolates each figure at the share of full attention's bytes that
`--bytes` names. A method that reads more than that at the smallest budget has no place in the
table; one that reads less at the largest stands with its largest. Results are kept in `--results`,
so that a run that was cut short goes on.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from retrace.analyze import Results, analyze
from retrace.traces import Trace, open_trace

METRICS = ("density", "recall", "attention_fraction", "error_norm")
TITLES = ("Keys attended", "Recall", "Attention fraction", "Error norm")


def main() -> None:
    """Replay and write the page."""
    arguments = _arguments()
    trace = open_trace(arguments.trace)
    results = analyze(
        trace,
        ["all"],
        arguments.topk,
        out=arguments.results,
        min_context=arguments.min_context,
        progress=lambda done, total: print(f"\r{done} of {total}", end="", flush=True),
    )
    print()
    page = _page(trace, results, arguments)
    if arguments.out is None:
        print(page)
    else:
        arguments.out.write_text(page, encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", required=True)
    parser.add_argument("--topk", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--min-context", type=int, default=1024)
    parser.add_argument("--bytes", type=float, nargs="+", default=[0.125, 0.25])
    parser.add_argument("--results", type=Path, default=Path("results/equal-bytes"))
    parser.add_argument("--out", type=Path, help="write the page to this file")
    return parser.parse_args()


def at_bytes(figures: pd.DataFrame, share: float) -> dict[str, float] | None:
    """A method's figures where it reads this share of full attention's bytes; None if it always
    reads more.

    Args:
        figures: one row per budget, ascending; columns `topk`, `bytes_ratio` and METRICS.
        share: 0.25 for a quarter of the bytes.
    """
    read = figures["bytes_ratio"].to_numpy()
    if read[0] > share:
        return None
    # What a method reads need not grow with its budget: the last within the share counts.
    last = int(np.flatnonzero(read <= share)[-1])
    weight = 0.0
    if last + 1 < len(read):
        weight = (share - read[last]) / (read[last + 1] - read[last])
    columns = ("topk", "bytes_ratio", *METRICS)
    values = {name: figures[name].to_numpy(dtype=float) for name in columns}
    following = min(last + 1, len(read) - 1)
    return {
        name: float((1 - weight) * value[last] + weight * value[following])
        for name, value in values.items()
    }


def _page(trace: Trace, results: Results, arguments: argparse.Namespace) -> str:
    means = results.metrics.groupby(["method", "topk", "metric"], sort=False)["mean"].mean()
    table = means.unstack("metric").reset_index().sort_values("topk")
    by_method = dict(iter(table.groupby("method")))
    run = results.run
    lines = [
        "# Methods at equal bytes",
        "",
        "Every method with its defaults, read off where it reads the same share of the bytes that "
        "full attention reads: the state it finds keys by, and each key and value that any head of "
        "a group attends. Figures are means over queries, heads and layers, interpolated between "
        f"budgets of {_listed(arguments.topk)} keys. Under the protocol `all` a method that "
        "evicts is judged as if each rebuilding were the end of a prompt: it attends and reads all "
        "keys since besides its budget. Those that keep most attention mass come first, which "
        "predicts what a model loses better than the error norm does "
        "([does-replay-predict.md](does-replay-predict.md)).",
        "",
        f"{_source(trace)}; all layers, queries from position {arguments.min_context} on, protocol "
        f"`{run['protocol']}`. Sequences for calibration, which no figure is from: "
        f"{_listed(run['calibration'] or ['none'])}. "
        "Made by `python -m benchmarks.science.methods`.",
    ]
    for share in arguments.bytes:
        rows, beyond = [], []
        for method, figures in by_method.items():
            found = at_bytes(figures, share)
            if found is None:
                beyond.append(f"{method} ({figures['bytes_ratio'].iloc[0]:.1%})")
            else:
                rows.append((method, found))
        rows.sort(key=lambda row: -row[1]["attention_fraction"])
        titles = ("Method", "Top-k", "Bytes", *TITLES)
        lines += ["", f"## {share:.1%} of the bytes", "", "| " + " | ".join(titles) + " |"]
        lines.append("| --- |" + " ---: |" * (len(titles) - 1))
        for method, found in rows:
            cells = [f"`{method}`", f"{found['topk']:.0f}", f"{found['bytes_ratio']:.1%}"]
            cells += [f"{found['density']:.1%}", *(f"{found[m]:.3f}" for m in METRICS[1:])]
            lines.append("| " + " | ".join(cells) + " |")
        if beyond:
            lines += ["", f"Read more at {arguments.topk[0]} keys already: {', '.join(beyond)}."]
    return "\n".join(lines) + "\n"


def _source(trace: Trace) -> str:
    lengths = [trace.length(s) for s in trace.sequences]
    dtype = trace.layer(trace.layers[0]).query(trace.sequences[0]).dtype
    model = trace.attributes["model"]["pretrained"]
    tasks = ", ".join(part["task"] for part in trace.attributes["task"])
    return f"{model}, {tasks}, {len(lengths)} sequences of up to {max(lengths):,} tokens in {dtype}"


def _listed(items: object) -> str:
    return ", ".join(map(str, items))  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
