"""How long every method takes on a GPU beside attention itself, on the same tensors in one process.

    python -m benchmarks.speed.methods_gpu --positions 8192 32768 --topk 64

A trace of random tensors of one layer as that of a Llama with 8 billion parameters is written, and
each method is replayed against it alone, twice; the quicker run counts. The GPU is waited for after
every step. A method's own time is that of its build, its search and the metrics of what it
selected. Reading, the exact pass and everything else that a run does stand in rows of their own:
the least over all runs. What is measured against is
`torch.nn.functional.scaled_dot_product_attention`, forward, causal, over the same queries, keys and
values in the trace's dtype.

`--alike n` makes n neighbouring keys alike, one of 200 clusters that queries lean towards. A method
that would take longer than `--limit` seconds, by its time for each score at the length before, is
left out, and the table says so. The table is written after each length.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import page
from benchmarks.machine import processor
from benchmarks.speed.random_trace import write_random
from retrace.analyze import BlockMethod, analyze
from retrace.analyze.methods.registry import method_class, method_names
from retrace.analyze.replay.clock import BEFORE
from retrace.traces import RetraceError, Trace, open_trace, to_torch

WARM_UP = 1024
"""Positions of the first run, which compiles what is compiled."""
STEPS = ("build", "search", "metrics")
SHARED = ("read", "exact pass", "everything else")
RUNS = 2

Spent = dict[str, float]
"""Seconds by step."""


def main() -> None:
    """Measure, print a table, and write it where asked."""
    arguments = _parse()
    topk = ", ".join(map(str, arguments.topk))
    alike = f", {arguments.alike} neighbouring keys alike" if arguments.alike else ""
    lines = [
        f"{processor('cuda')}, torch {torch.__version__}; one layer of 32 heads, 8 kv heads and "
        f"128 channels in bfloat16, every query, random tensors{alike}, top-k {topk}."
    ]
    spent: dict[str, Spent] = {}
    before = WARM_UP
    for positions in (WARM_UP, *arguments.positions):
        growth = (positions / before) ** 2
        long = {method: own(steps) * growth for method, steps in spent.items()}
        methods = [m for m in arguments.methods if long.get(m, 0.0) <= arguments.limit]
        sdpa, shared, fresh = _measure(positions, methods, arguments)
        spent |= fresh
        before = positions
        if positions == WARM_UP:
            arguments.methods = [*fresh]
            continue
        lines += ["", *_table(positions, sdpa, shared, fresh)]
        if left := {m: s for m, s in long.items() if m not in methods}:
            told = ", ".join(
                f"{method} (about {seconds:.0f} s)" for method, seconds in left.items()
            )
            lines += ["", f"Left out: {told}."]
        page.publish("\n".join(lines), arguments.out)


def own(steps: Spent) -> float:
    """Seconds of what a method does itself."""
    return sum(steps.get(step, 0.0) for step in STEPS)


def _parse() -> argparse.Namespace:
    parser = page.parser(__doc__)
    parser.add_argument("--positions", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--topk", type=int, nargs="+", default=[64])
    # Those of blocks of queries are of another protocol.
    names = [name for name in method_names() if not issubclass(method_class(name), BlockMethod)]
    parser.add_argument("--methods", nargs="+", default=names)
    parser.add_argument("--alike", type=int, default=0, help="neighbouring random keys alike")
    parser.add_argument("--limit", type=float, default=20, help="seconds of one method at most")
    parser.add_argument("--folder", type=Path, default=Path(), help="for the trace, for a while")
    return parser.parse_args()


def _measure(
    positions: int, methods: list[str], arguments: argparse.Namespace
) -> tuple[float, Spent, dict[str, Spent]]:
    """Seconds of SDPA, of what methods share, and of each method that can be run."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "random.zarr"
        write_random(path, positions, np.arange(positions), device="cuda", alike=arguments.alike)
        trace = open_trace(path)
        sdpa = _sdpa(trace)
        shared: Spent = {}
        found: dict[str, Spent] = {}
        for method in methods:
            try:
                runs = [_run(trace, method, arguments.topk) for _ in range(RUNS)]
            except RetraceError as error:
                print(f"{method}: {error}", flush=True)
                continue
            found[method] = min(runs, key=own)
            print(f"{positions} {method}: {own(found[method]) / sdpa:.0f} x SDPA", flush=True)
            for run in runs:
                for step in SHARED:
                    shared[step] = min(shared.get(step, run[step]), run[step])
    return sdpa, shared, found


def _run(trace: Trace, method: str, topk: list[int]) -> Spent:
    """Seconds of one run, by step."""
    results = analyze(
        trace, [method], topk, device="cuda", workers=1, keep_exact=False, profile=True
    )
    profile = results.profile()
    profile = profile[~profile["Step"].isin(BEFORE)]
    # What metrics need of the exact answers is no method's.
    shared = (profile["Step"] == "metrics") & (profile["Method"] == "")
    steps = profile["Step"].mask(shared, "exact pass")
    spent: Spent = profile["Seconds"].groupby(steps).sum().to_dict()
    return spent


def _sdpa(trace: Trace) -> float:
    """Seconds of attention itself."""
    layer = trace.layer(0)
    group = layer.rules.heads // layer.rules.kv_heads
    query, key, value = (
        to_torch(tensor(0)).to("cuda")[None] for tensor in (layer.query, layer.key, layer.value)
    )
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _table(positions: int, sdpa: float, shared: Spent, methods: dict[str, Spent]) -> list[str]:
    told = ", ".join(f"{step} {seconds * 1e3:.0f} ms" for step, seconds in shared.items())
    lines = [
        f"{positions:,} positions; SDPA {sdpa * 1e3:.2f} ms; besides, for all methods: {told}.",
        "",
        "| method | build, ms | search, ms | metrics, ms | own, ms | times SDPA |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, steps in sorted(methods.items(), key=lambda item: own(item[1])):
        each = " | ".join(f"{steps.get(step, 0.0) * 1e3:,.1f}" for step in STEPS)
        ratio = own(steps) / sdpa
        lines.append(f"| {method} | {each} | {own(steps) * 1e3:,.1f} | {ratio:,.1f} |")
    return lines


if __name__ == "__main__":
    main()
