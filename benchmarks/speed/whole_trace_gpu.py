"""How long a whole trace takes on a GPU: one method beside the disk, and all methods together.

    python -m benchmarks.speed.whole_trace_gpu --folder /tmp

A trace of random tensors of all 32 layers of a Llama with 8 billion parameters is written, one
sequence, every query. It is flushed and dropped from the system's memory before each run, and so it
is read from the disk. The disk's own rate is that of reading the trace's files one after the other,
in large pieces. What a run starts with, such as the trial for causality, is counted too.

The methods of the second run are all that need no calibration, no other library and no index on a
CPU; a short trace tells which they are, and compiles what is compiled.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import page
from benchmarks.machine import processor
from benchmarks.speed.random_trace import write_random
from retrace.analyze import BlockMethod, SearchMethod, analyze
from retrace.analyze.methods.registry import method_class, method_names
from retrace.traces import RetraceError, Trace, open_trace

WARM_UP = 1024
PIECE = 1 << 24


def main() -> None:
    """Measure, print a table, and write it where asked."""
    arguments = _parse()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        short, whole = Path(folder) / "short.zarr", Path(folder) / "whole.zarr"
        write_random(short, WARM_UP, np.arange(WARM_UP), device="cuda")
        _run(short, [arguments.one], arguments.budgets, 1, 0)
        positions = arguments.positions
        write_random(whole, positions, np.arange(positions), layers=arguments.layers, device="cuda")
        size, disk = _read(whole)
        lines = [
            f"{processor('cuda')}, torch {torch.__version__}; {arguments.layers} layers of 32 "
            f"heads, 8 kv heads and 128 channels in bfloat16, one sequence of {positions:,} "
            f"positions, every query: {size / 1e9:.2f} GB, which the disk gives in {disk:.2f} s.",
            "",
            "| methods | budgets | workers | seconds | times reading |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        budgets = arguments.budgets
        for workers in sorted({1, arguments.workers}):
            seconds = _run(whole, [arguments.one], budgets, workers)
            lines.append(_row(arguments.one, budgets, workers, seconds, disk))
            page.publish("\n".join(lines), arguments.out)
        if arguments.few:
            methods = [m for m in _free() if _works(short, m, arguments.few)]
            seconds = _run(whole, methods, arguments.few, arguments.workers)
            count = f"{len(methods)} methods"
            lines.append(_row(count, arguments.few, arguments.workers, seconds, disk))
            lines += ["", f"These are {', '.join(methods)}."]
            page.publish("\n".join(lines), arguments.out)


def _parse() -> argparse.Namespace:
    parser = page.parser(__doc__)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--one", default="quest", help="the method that is replayed alone")
    ten = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    parser.add_argument("--budgets", type=int, nargs="+", default=ten, help="of that method")
    parser.add_argument("--few", type=int, nargs="*", default=[16, 64, 256], help="of all methods")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(), help="for the trace, for a while")
    return parser.parse_args()


def _free() -> list[str]:
    """Methods that choose query by query, with PyTorch alone."""
    found = []
    for name in method_names():
        kind = method_class(name)
        if not issubclass(kind, BlockMethod | SearchMethod) and kind.extra is None:
            found.append(name)
    return found


def _works(path: Path, method: str, topk: list[int]) -> bool:
    """Whether a method needs nothing but the trace."""
    try:
        _run(path, [method], topk, 1, 0)
    except RetraceError as error:
        print(f"{method}: {error}", flush=True)
        return False
    return True


def _run(
    path: Path, methods: list[str], topk: list[int], workers: int, least: int | None = None
) -> float:
    """Seconds of a run from the disk, of queries from a `least` position on."""
    trace: Trace = open_trace(path)
    _forget(path)
    start = time.perf_counter()
    analyze(
        trace, methods, topk, device="cuda", workers=workers, keep_exact=False, min_context=least
    )
    return time.perf_counter() - start


def _read(path: Path) -> tuple[int, float]:
    """Bytes of a trace's files, and the seconds that reading them takes."""
    _forget(path)
    start, size = time.perf_counter(), 0
    piece = bytearray(PIECE)
    for file in _files(path):
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(piece):
                size += count
    return size, time.perf_counter() - start


def _forget(path: Path) -> None:
    """Drop a trace's files from the system's memory."""
    for file in _files(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def _row(methods: str, topk: list[int], workers: int, seconds: float, disk: float) -> str:
    budgets = ", ".join(map(str, topk))
    return f"| {methods} | {budgets} | {workers} | {seconds:.1f} | {seconds / disk:.1f} |"


if __name__ == "__main__":
    main()
