"""What each step of replaying one layer of a long sequence takes.

    python -m benchmarks.speed.long_replay --device cuda --positions 131072 --queries last:256 all

For each length and each choice of queries a trace of random tensors is written, by default one
layer as that of a Llama with 8 billion parameters, flushed, and dropped from the system's memory
so that it is read from the disk. All methods are then replayed against it in one run without kept
answers, one thread or one GPU, which is waited for after every step. The exact pass and reading
are shared by all methods; the check of causality and what a run starts with, which do not grow
with layers and sequences, are left out. A method but the first that would take longer than
`--limit` seconds, by its time for each score at the length before, is left out. The table is
written after each run.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import page
from benchmarks.machine import processor
from benchmarks.speed.random_trace import write_random
from retrace.analyze import analyze
from retrace.analyze.replay.clock import BEFORE
from retrace.traces import open_trace
from retrace.traces.queries import parse_queries

SHARED = ("read", "exact pass")


def main() -> None:
    """Measure, print a table, and write it where asked."""
    arguments = _parse()
    lines = [
        f"{processor(arguments.device)}, torch {torch.__version__}; one layer of "
        f"{arguments.heads} heads, {arguments.kv_heads} kv heads and {arguments.channels} channels "
        f"in {arguments.dtype}, top-k {', '.join(map(str, arguments.topk))}.",
        "",
        "| positions | queries | MB | step | seconds |",
        "| ---: | --- | ---: | --- | ---: |",
    ]
    _run(1024, "all", arguments, arguments.methods)  # what is compiled, is compiled here
    per_score: dict[tuple[str, str], float] = {}
    for positions in arguments.positions:
        for queries in arguments.queries:
            kept = parse_queries(queries).positions(positions)
            scores = float(kept.astype("int64").sum()) + len(kept)
            long = {
                method: per_score.get((queries, method), 0.0) * scores
                for method in arguments.methods
            }
            first, *others = arguments.methods
            methods = [first, *(m for m in others if long[m] <= arguments.limit)]
            start = time.perf_counter()
            size, spent = _run(positions, queries, arguments, methods)
            print(f"{positions} {queries}: {time.perf_counter() - start:.0f} s in all", flush=True)
            per_score |= {(queries, m): spent[m] / scores for m in methods}
            for step in (*SHARED, *arguments.methods):
                seconds = (
                    f"{spent[step]:.2f}" if step in spent else f"left out, about {long[step]:.0f}"
                )
                lines.append(
                    f"| {positions:,} | {queries} | {size / 1e6:,.0f} | {step} | {seconds} |"
                )
            if arguments.out:
                arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if arguments.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(arguments.device) / 2**30
        lines[0] += f" GPU memory at most: {peak:.1f} GiB."
    page.publish("\n".join(lines), arguments.out)


def _parse() -> argparse.Namespace:
    parser = page.parser(__doc__)
    parser.add_argument("--positions", type=int, nargs="+", default=[32768])
    parser.add_argument("--queries", nargs="+", default=["last:256"], help="as in retrace capture")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--methods", nargs="+", default=["exact", "quest", "sparq"])
    parser.add_argument("--topk", type=int, nargs="+", default=[64])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--limit", type=float, default=120, help="seconds of one method at most")
    parser.add_argument("--folder", type=Path, default=Path(), help="for the trace, for a while")
    return parser.parse_args()


def _run(
    positions: int, queries: str, arguments: argparse.Namespace, methods: list[str]
) -> tuple[int, dict[str, float]]:
    """Bytes of a layer's tensors, and seconds by step: what is shared, and each method's own."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "long.zarr"
        write_random(
            path,
            positions,
            parse_queries(queries).positions(positions),
            heads=arguments.heads,
            kv_heads=arguments.kv_heads,
            channels=arguments.channels,
            dtype=arguments.dtype,
        )
        _forget(path)
        trace = open_trace(path)
        results = analyze(
            trace, methods, arguments.topk, device=str(arguments.device), workers=1,
            keep_exact=False, profile=True,
        )  # fmt: skip
        profile = results.profile()
        profile = profile[~profile["Step"].isin([*BEFORE, "everything else"])]
        steps = profile["Method"].where(profile["Method"] != "", profile["Step"])
        # What metrics need of the exact answers is computed once for all methods.
        steps = steps.replace("metrics", "exact pass")
        spent = profile["Seconds"].groupby(steps).sum().to_dict()
        return trace.nbytes(), spent


def _forget(path: Path) -> None:
    """Drop what the system holds of these files, where it can be told to."""
    for file in path.rglob("*"):
        if file.is_file() and hasattr(os, "posix_fadvise"):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
