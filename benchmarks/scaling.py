"""What more workers bring to a run of `analyze`, and that they change no figure.

    python benchmarks/scaling.py --trace t.zarr --workers 1 2 4 --out benchmarks/results/scaling.md

The same run is done with each number of workers: one is a thread of this process, more are
processes, whose start is counted. No exact answers are kept. Each writes its results to a folder,
and their `metrics.parquet` must be the same byte for byte.
"""

import argparse
import hashlib
import tempfile
import time
from pathlib import Path

import torch
from replay import processor

from retrace.analyze import analyze
from retrace.traces import Trace, open_trace

METHODS = ("exact", "quest", "sparq", "loki:basis=own", "low-bit", "window")
BUDGETS = (16, 64)


def main() -> None:
    """Measure, print a table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, nargs="+", help="all by default")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    trace = open_trace(arguments.trace)
    cores = max(arguments.workers)
    torch.set_num_threads(cores)
    # Compiled loops and the first pages of the trace are not counted.
    analyze(trace, METHODS, BUDGETS, layers=trace.layers[:1], device="cpu", keep_exact=False)
    found = [(str(n), *_run(trace, n, arguments.layers)) for n in sorted(arguments.workers)]
    same = len({digest for _, _, digest in found}) == 1
    alone = found[0][1]
    layers = len(arguments.layers or trace.layers)
    lines = [
        f"{processor(torch.device('cpu'))}, {cores} cores, torch {torch.__version__}; "
        f"{len(METHODS)} methods at {len(BUDGETS)} budgets over {layers} layers of "
        f"{len(trace.sequences)} sequences. `metrics.parquet` is "
        f"{'the same in every run' if same else 'NOT the same in every run'}.",
        "",
        "| workers | seconds | times as fast as the first |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name} | {s:.1f} | {alone / s:.2f} |" for name, s, _ in found]
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    if not same:
        raise SystemExit(1)


def _run(trace: Trace, workers: int, layers: list[int] | None) -> tuple[float, str]:
    """Seconds of a run, and the digest of its figures."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        analyze(
            trace, METHODS, BUDGETS, out=folder, layers=layers, device="cpu", workers=workers,
            keep_exact=False,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        return seconds, hashlib.sha256((Path(folder) / "metrics.parquet").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
