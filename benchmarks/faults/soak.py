"""Whether a long life leaks: everything retrace does, over and over in one process.

    python -m benchmarks.faults.soak --minutes 12 --out benchmarks/results/soak.md

Each cycle captures a tiny random model, goes on with that capture, verifies the trace, replays
methods against it in two runs of one folder and in parts that are merged, draws, reports,
recommends and runs a method in the loop, through the Python API; every few cycles two processes
share the work of one run. Then all files are removed, and the open files, threads, child processes
and resident memory are counted. After the first cycle the process may have only `--headroom` MiB of
data more than it has by then (RLIMIT_DATA), so that what grows without end ends the run.

After the first quarter, files, threads and processes must be the same after every cycle, and
memory flat: a line through it must rise by less than 2% of it until the end. Otherwise the exit
code is 1.
"""

import gc
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import page
from benchmarks.machine import resident
from benchmarks.tiny_models import TEXT, save_tiny_model
from retrace.analyze import analyze, merge, recommend
from retrace.analyze.commands.report import report
from retrace.capture import capture, evaluate
from retrace.traces import verify_trace

PROCESSES_EVERY = 5
"""Cycles of which one gives its work to processes."""
RISE = 0.02
"""Share of the memory by which a line through it may rise."""


@dataclass(frozen=True)
class Count:
    """What the process holds after a cycle."""

    files: int
    threads: int
    children: int
    resident: int
    """Bytes."""


def main() -> int:
    """Run cycles, print a table, and write it where asked."""
    parser = page.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--headroom", type=int, default=256, help="MiB of data")
    arguments = parser.parse_args()
    counts: list[Count] = []
    most = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_tiny_model("mistral", folder / "model")
        (folder / "text.txt").write_text(TEXT * 3)
        end = time.monotonic() + 60 * arguments.minutes
        while not counts or time.monotonic() < end:
            cycle(folder, workers=1 if (len(counts) + 1) % PROCESSES_EVERY else 2)
            counts.append(count())
            print(f"{len(counts)}: {counts[-1]}", file=sys.stderr, flush=True)
            if len(counts) == 1:
                most = resident("VmData") + (arguments.headroom << 20)
                resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    table, flat = judge(counts)
    page.publish("\n".join([_heading(counts, most), "", *table]), arguments.out)
    return 0 if flat else 1


def cycle(folder: Path, workers: int) -> None:
    """Everything once, and nothing left of it on the disk."""
    work = folder / "work"
    work.mkdir()
    trace, results, parts = work / "t.zarr", work / "r", work / "p"
    of = {"text": [folder / "text.txt"], "max_length": 100, "out": trace}
    capture(str(folder / "model"), limit=8, **of)
    capture(str(folder / "model"), limit=8, resume=True, **of)
    if not verify_trace(trace).whole:
        raise SystemExit("The trace is damaged.")
    analyze(trace, ["exact", "loki"], [2, 4], out=results, workers=workers)
    found = analyze(trace, ["quest:page=8", "sparq"], [2, 4], out=results, workers=1)
    for part in (1, 2):
        analyze(trace, ["window"], [2], out=parts, workers=1, part=(part, 2))
    merge([parts])
    found.draw(work / "plots")
    report([results, parts], work / "report.html")
    recommend(trace, "error_norm=0.9", ["window", "exact"], [4, 16], workers=1)
    evaluate(trace, ["window"], [4], out=work / "e")
    shutil.rmtree(work)


def count() -> Count:
    """What this process holds when the collector has been."""
    gc.collect()
    files = os.listdir("/proc/self/fd")  # among them the one that lists them
    threads = list(Path("/proc/self/task").iterdir())
    children = [pid for t in threads for pid in (t / "children").read_text("ascii").split()]
    return Count(len(files) - 1, len(threads), len(children), resident("VmRSS"))


def judge(counts: Sequence[Count]) -> tuple[list[str], bool]:
    """A table of what was held, and whether it was flat after the first quarter."""
    first = len(counts) // 4
    late = counts[first:]
    lines = [
        f"| held after a cycle | after the first | from cycle {first + 1} on | flat |",
        "| --- | ---: | ---: | --- |",
    ]
    every = True
    for name in ("files", "threads", "children"):
        held = [getattr(c, name) for c in late]
        flat = min(held) == max(held)
        seen = str(held[0]) if flat else f"{min(held)} to {max(held)}, at last {held[-1]}"
        first_held = getattr(counts[0], name)
        lines.append(f"| {name} | {first_held} | {seen} | {'yes' if flat else 'NO'} |")
        every &= flat
    memory = np.array([c.resident for c in late]) / 2**20
    slope = float(np.polyfit(np.arange(len(memory)), memory, 1)[0]) if len(memory) > 1 else 0.0
    rise = slope * (len(memory) - 1)
    flat = rise < RISE * float(memory.mean())
    lines.append(
        f"| resident memory, MiB | {counts[0].resident / 2**20:.1f} | {memory.min():.1f} to "
        f"{memory.max():.1f}; by a line {1024 * slope:+.1f} KiB a cycle, {rise:+.1f} MiB in all "
        f"| {'yes' if flat else 'NO'} |"
    )
    return lines, every and flat


def _heading(counts: Sequence[Count], most: int) -> str:
    return (
        f"{page.origin()}: {len(counts)} cycles in one process that may have "
        f"{most / 2**20:.0f} MiB of data, every {PROCESSES_EVERY}th with two worker processes."
    )


if __name__ == "__main__":
    sys.exit(main())
