"""What more workers bring to a run of `analyze`, and that they change no figure.

    python -m benchmarks.speed.scaling --trace t.zarr --workers 1 2 4

The same run is done with each number of workers: one is a thread of this process, more are
processes, whose start is counted. No exact answers are kept. Each writes its results to a folder,
and their `metrics.parquet` must be the same byte for byte.

    python -m benchmarks.speed.scaling --device cuda

On GPUs there is a process on each, and G of them replay the sequences of one GPU and G times as
many. A trace of random tensors is made for it: a layer of 32 heads, 8 kv heads and 128 channels in
bfloat16, and so many sequences that one GPU has work for about `--seconds`. Each run is done with
processes that have started and have their kernels loaded, and with their start counted; one worker
is then a thread of this process. Runs over the same sequences must give the same bytes.
"""

import argparse
import hashlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import page
from benchmarks.machine import processor
from benchmarks.speed.random_trace import write_random
from retrace.analyze import analyze
from retrace.analyze.workers.processes import Processes
from retrace.analyze.workers.start import gpu_environments
from retrace.traces import Trace, open_trace

METHODS = ("exact", "quest", "sparq", "loki:basis=own", "low-bit", "window")
BUDGETS = (16, 64)
MAKING = 60
"""Seconds that all random sequences may take to be made."""


def main() -> None:
    """Measure, print a table, and write it where asked."""
    parser = page.parser(__doc__)
    parser.add_argument("--trace", help="on a CPU")
    parser.add_argument("--workers", type=int, nargs="+", help="1 and 2, or as many as GPUs")
    parser.add_argument("--layers", type=int, nargs="+", help="of the trace; all by default")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--positions", type=int, default=32768, help="of random sequences")
    parser.add_argument("--seconds", type=float, default=15, help="of work for one GPU")
    parser.add_argument("--folder", type=Path, default=Path(), help="for the trace, for a while")
    arguments = parser.parse_args()
    lines, same = (_on_cores if arguments.device.type == "cpu" else _on_gpus)(arguments)
    page.publish("\n".join(lines), arguments.out)
    if not same:
        raise SystemExit(1)


def _on_cores(arguments: argparse.Namespace) -> tuple[list[str], bool]:
    """The table, and whether figures are the same."""
    trace = open_trace(arguments.trace)
    workers = sorted(arguments.workers or [1, 2])
    cores = max(workers)
    torch.set_num_threads(cores)
    # Compiled loops and the first pages of the trace are not counted.
    analyze(trace, METHODS, BUDGETS, layers=trace.layers[:1], device="cpu", keep_exact=False)
    found = [
        (str(n), *_run(trace, layers=arguments.layers, device="cpu", workers=n)) for n in workers
    ]
    same = len({digest for _, _, digest in found}) == 1
    alone = found[0][1]
    layers = len(arguments.layers or trace.layers)
    lines = [
        f"{processor(arguments.device)}, {cores} cores, torch {torch.__version__}; "
        f"{len(METHODS)} methods at {len(BUDGETS)} budgets over {layers} layers of "
        f"{len(trace.sequences)} sequences. {_verdict(same)}",
        "",
        "| workers | seconds | times as fast as the first |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name} | {s:.1f} | {alone / s:.2f} |" for name, s, _ in found]
    return lines, same


def _on_gpus(arguments: argparse.Namespace) -> tuple[list[str], bool]:
    """The table, and whether figures are the same."""
    device = arguments.device
    gpus = gpu_environments(device)
    most = max(arguments.workers or [len(gpus)])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        share = _sequences(Path(folder), most, arguments)
        trace = _random_trace(Path(folder, "t.zarr"), most * share, arguments)
        found: dict[tuple[int, int], tuple[float, float]] = {}
        digests: dict[int, set[str]] = {}
        for count in sorted({1, *(arguments.workers or [most])}):
            for sequences in sorted({share, count * share}):
                some = _first(trace, sequences)
                with Processes(count, gpus) as pool:
                    _run(_first(trace, count), device=str(device), executor=pool)
                    started, one = _run(some, device=str(device), executor=pool)
                starting, other = _run(some, device=str(device), workers=count)
                found[count, sequences] = started, starting
                digests.setdefault(sequences, set()).update((one, other))
                print(f"{count}, {sequences}: {started:.1f} s, {starting:.1f}", flush=True)
    same = all(len(of_these) == 1 for of_these in digests.values())
    lines = [
        f"{processor(device)}, {most} of them, torch {torch.__version__}; {len(METHODS)} methods "
        f"at {len(BUDGETS)} budgets over one layer of 32 heads, 8 kv heads and 128 channels in "
        f"bfloat16, {arguments.positions:,} positions. Of runs over the same sequences, "
        f"{_verdict(same)}",
        "",
        "| GPUs | sequences | seconds | times the sequences a second | with the start of workers "
        "| times |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (count, sequences), seconds in found.items():
        rates = [
            (sequences / now) / (share / alone)
            for now, alone in zip(seconds, found[1, share], strict=True)
        ]
        lines.append(
            f"| {count} | {sequences} | {seconds[0]:.1f} | {rates[0]:.2f} | {seconds[1]:.1f} | "
            f"{rates[1]:.2f} |"
        )
    return lines, same


def _sequences(folder: Path, gpus: int, arguments: argparse.Namespace) -> int:
    """How many sequences are work enough for one GPU, if there is time and room to make as many
    for all of them."""
    torch.zeros(1, device=arguments.device)  # CUDA begins
    start = time.perf_counter()
    trace = _random_trace(folder / "first.zarr", 1, arguments)
    took = time.perf_counter() - start
    _run(trace, device=str(arguments.device), workers=1)  # compiles the kernels
    each, _ = _run(trace, device=str(arguments.device), workers=1)
    room = shutil.disk_usage(folder).free / 2 / trace.nbytes()
    share = max(1, int(min(arguments.seconds / each, MAKING / took / gpus, room / gpus)))
    print(f"A sequence is replayed in {each:.2f} s and made in {took:.2f}: {share} a GPU.")
    return share


def _random_trace(path: Path, sequences: int, arguments: argparse.Namespace) -> Trace:
    """A trace of one layer with random queries, keys and values."""
    length = arguments.positions
    write_random(path, length, range(length), sequences=sequences, device=arguments.device)
    return open_trace(path)


def _first(trace: Trace, sequences: int) -> Trace:
    """The trace as if it had no more sequences."""
    return trace.without(dict.fromkeys(trace.sequences[sequences:], "of a larger run"))


def _run(trace: Trace, **settings: Any) -> tuple[float, str]:
    """Seconds of a run, and the digest of its figures."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        analyze(trace, METHODS, BUDGETS, out=folder, keep_exact=False, **settings)
        seconds = time.perf_counter() - start
        return seconds, hashlib.sha256((Path(folder) / "metrics.parquet").read_bytes()).hexdigest()


def _verdict(same: bool) -> str:
    return f"`metrics.parquet` is {'the same' if same else 'NOT the same'} in every run."


if __name__ == "__main__":
    main()
