"""All methods at equal bytes: what each is worth for what it reads.

    python -m benchmarks.science.methods --trace t.zarr --out docs/equal-bytes.md

Replays every installed method with its defaults at the budgets of `--topk`, for queries that see at
least `--min-context` keys, in all layers, since some methods select in few of them for the others,
and reads each figure off at the share of full attention's bytes that
`--bytes` names (`Results.at_bytes`). A method that reads more than that at its smallest budget, or
less at its largest, has no place in the table. Results are kept in `--results`, so a run that was
cut short goes on.
"""

import argparse
from pathlib import Path

from retrace.analyze import Results, analyze
from retrace.analyze.outputs.equal_bytes import outside_words
from retrace.traces import Trace, open_trace

METRICS = ("bytes_ratio", "density", "recall", "attention_fraction", "error_norm")
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


def _page(trace: Trace, results: Results, arguments: argparse.Namespace) -> str:
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
        found = results.at_bytes([share], metrics=METRICS).dropna(subset="mean")
        rows = found.pivot_table("mean", ["method", "topk"], "metric", sort=False)
        titles = ("Method", "Top-k", "Bytes", *TITLES)
        lines += ["", f"## {share:.1%} of the bytes", "", "| " + " | ".join(titles) + " |"]
        lines.append("| --- |" + " ---: |" * (len(titles) - 1))
        ranked = rows.sort_values("attention_fraction", ascending=False, kind="stable")
        for (method, k), figures in ranked.iterrows():
            cells = [f"`{method}`", f"{k:.0f}"]
            cells += [f"{figures[m]:.1%}" for m in METRICS[:2]]
            cells += [f"{figures[m]:.3f}" for m in METRICS[2:]]
            lines.append("| " + " | ".join(cells) + " |")
        if words := outside_words(results, share):
            lines += ["", words]
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
