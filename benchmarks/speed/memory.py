"""How much memory a replay of one very long sequence takes, method by method.

    python -m benchmarks.speed.memory --out benchmarks/results/memory.md

A trace of random tensors is written through the trace's own writer: `--layers` layers of one
sequence of `--positions` tokens of which the queries of the last `--queries` are kept, by default
131,072 and 256, and a layer as that of a model with 8 billion parameters in bfloat16. Each method
is replayed against it in a process of its own, on `--threads` threads with a layer each. Its peak
is the largest resident set that Linux saw; what a process has once everything is imported and
the trace is open is taken off, and the tensors of one unit (a kv head's keys and values and its
group's queries, as the trace holds them) are told beside it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import page
from benchmarks.machine import resident
from benchmarks.speed.random_trace import write_random
from retrace.analyze import analyze
from retrace.traces import open_trace
from retrace.traces.schema import DTYPES

METHODS = ("exact", "window", "quest", "sparq", "loki:basis=own", "low-bit", "pqcache")


def main() -> None:
    """Measure, print a table, and write it where asked."""
    arguments = _parse()
    if arguments.replay:
        print(json.dumps(_replay(arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        trace = Path(folder) / "long.zarr"
        write_random(
            trace,
            arguments.positions,
            range(arguments.positions - arguments.queries, arguments.positions),
            layers=arguments.layers,
            heads=arguments.heads,
            kv_heads=arguments.kv_heads,
            channels=arguments.channels,
            dtype=arguments.dtype,
        )
        runs = [[method] for method in arguments.methods]
        if len(runs) > 1:
            runs.append(arguments.methods)
        rows: list[tuple[list[str], dict[str, float]]] = []
        for methods in runs:
            rows.append((methods, _in_a_process(trace, methods, arguments)))
            if arguments.out:  # each as it comes, since all of them take a while
                arguments.out.write_text(_table(rows, arguments) + "\n", encoding="utf-8")
    page.publish(_table(rows, arguments), arguments.out)


def _parse() -> argparse.Namespace:
    parser = page.parser(__doc__)
    parser.add_argument("--positions", type=int, default=1 << 17)
    parser.add_argument("--queries", type=int, default=256, help="kept, at the sequence's end")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--topk", type=int, nargs="+", default=[64])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path(), help="for the trace, for a while")
    parser.add_argument("--replay", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_a_process(
    trace: Path, methods: list[str], arguments: argparse.Namespace
) -> dict[str, float]:
    options = {"--replay": [trace], "--methods": methods, "--topk": arguments.topk}
    options["--threads"] = [arguments.threads]
    words = [str(w) for name, values in options.items() for w in (name, *values)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.memory", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _replay(arguments: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(arguments.threads)
    trace = open_trace(arguments.replay)
    before = resident("VmRSS")
    start = time.perf_counter()
    analyze(trace, arguments.methods, arguments.topk, device="cpu", keep_exact=False)
    return {"before": before, "peak": resident("VmHWM"), "seconds": time.perf_counter() - start}


def _table(rows: list[tuple[list[str], dict[str, float]]], arguments: argparse.Namespace) -> str:
    group = arguments.heads // arguments.kv_heads
    elements = 2 * arguments.positions + group * arguments.queries
    unit = elements * arguments.channels * DTYPES[arguments.dtype].itemsize
    lines = [
        f"{arguments.layers} layers of {arguments.heads} heads, {arguments.kv_heads} kv heads and "
        f"{arguments.channels} channels in {arguments.dtype}, {arguments.positions:,} positions, "
        f"the last {arguments.queries} queries, top-k "
        f"{', '.join(map(str, arguments.topk))}; {arguments.threads} threads, torch "
        f"{torch.__version__}. The tensors of a unit are {unit / 2**30:.2f} GiB; "
        f"{rows[0][1]['before'] / 2**30:.2f} GiB are there before the replay.",
        "",
        "| methods | GiB at most | less what was there before | less one unit too | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for methods, seen in rows:
        name = methods[0] if len(methods) == 1 else "all of these in one run"
        above = seen["peak"] - seen["before"]
        figures = [f"{x / 2**30:.2f}" for x in (seen["peak"], above, above - unit)]
        lines.append(f"| {' | '.join([name, *figures, str(round(seen['seconds']))])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
