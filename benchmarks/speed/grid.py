"""What a grid of methods and budgets costs beside a script that goes through them one by one.

    python -m benchmarks.speed.grid --trace t.zarr --layers 10 --out benchmarks/results/grid.md

One call of `analyze` replays the first methods of a list at the first budgets of another, over
the layers named and all sequences, with no exact answers kept. The usual script holds two whole
matrices of scores for each layer and sequence and compares sets of keys query by query
(`two_matrices` of `replay.py`), once for every method and budget. Its time is not that of a whole
grid: it is measured for the exact method at one budget in every layer and sequence, and multiplied
by methods and the budgets' own measured costs in one of them. A method's own search, which the
script would add, is left out, so that its time is a lower bound.
"""

import time

import torch

from benchmarks import page
from benchmarks.machine import processor
from benchmarks.speed.replay import two_matrices
from retrace.analyze import analyze
from retrace.traces import Trace, open_trace, to_torch

METHODS = (
    "quest",
    "exact",
    "window",
    "sparq",
    "loki:basis=own",
    "knorm",
    "keydiff",
    "low-bit",
    "mean-page",
    "quest:page=32",
)
BUDGETS = (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
GRIDS = ((1, 1), (10, 1), (1, 10), (10, 10))


def main() -> None:
    """Measure, print a table, and write it where asked."""
    parser = page.parser(__doc__)
    parser.add_argument("--trace", required=True)
    parser.add_argument("--layers", type=int, nargs="+", help="all by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trace = open_trace(arguments.trace)
    layers = arguments.layers or list(trace.layers)
    tasks = [(layer, sequence) for layer in layers for sequence in trace.sequences]

    # Compiled loops and the first pages of the trace are not counted.
    analyze(trace, METHODS, BUDGETS[:1], layers=layers[:1], device="cpu", keep_exact=False)
    whole = sum(_script(trace, task, BUDGETS[0]) for task in tasks)
    costs = [_script(trace, tasks[0], k) for k in BUDGETS]
    lines = [
        f"{processor()}, {arguments.threads} threads, torch "
        f"{torch.__version__}; {trace.path.stem}, {len(layers)} layers of {len(trace.sequences)} "
        f"sequences, {trace.dtype}. The script's seconds are measured for one method and k = "
        f"{BUDGETS[0]} over all of them, {whole:.1f} s, and extrapolated to the rest of the grid.",
        "",
        "| methods | budgets | retrace, s | script, s | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for methods, budgets in GRIDS:
        start = time.perf_counter()
        named, topk = METHODS[:methods], BUDGETS[:budgets]
        analyze(trace, named, topk, layers=layers, device="cpu", keep_exact=False)
        ours = time.perf_counter() - start
        script = whole * methods * sum(costs[:budgets]) / costs[0]
        lines.append(f"| {methods} | {budgets} | {ours:.1f} | {script:.0f} | {script / ours:.0f} |")
    page.publish("\n".join(lines), arguments.out)


def _script(trace: Trace, task: tuple[int, int], k: int) -> float:
    """Seconds of the usual script for one layer and sequence."""
    layer, sequence = trace.layer(task[0]), task[1]
    start = time.perf_counter()
    with torch.inference_mode():
        tensors = (layer.query(sequence), layer.key(sequence), layer.value(sequence))
        two_matrices(*map(to_torch, tensors), k)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
