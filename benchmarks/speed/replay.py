"""How long the exact pass takes beside attention itself, on the same tensors in one run.

    python -m benchmarks.speed.replay --trace t.zarr --layer 10

    python -m benchmarks.speed.replay --device cuda --topk 64 256 --alike 64

    python -m benchmarks.speed.replay --positions 1024 2048 4096 8192 --topk 64 --plot sweep.png

Without a trace it takes random tensors: of SmolLM2's shape in float32, or on a GPU of 32 heads over
8 kv heads of 128 channels in bfloat16. `--alike n` makes n neighbouring keys alike, one of 200
clusters that queries lean towards. Compared are, for one layer:

- SDPA: `torch.nn.functional.scaled_dot_product_attention`, forward, causal: what a model pays;
- two matrices: scores and their copy without the unselected keys, both whole, and recall from sets,
  query by query: the way that scripts about one method usually go (not on a GPU);
- plain blocks: scores of a block of queries, `torch.topk` and a softmax;
- retrace: the exact pass, with ties settled, output, normalizer and every budget up to k.

Each is run `--repeat` times after one to warm up; the least time counts. Ratios are to SDPA of the
same length. Memory is the most that a run takes beside its inputs, by the GPU's allocator or by
Linux's count of resident pages. What would take longer than `--limit` seconds, judged by the square
of the length, or more than half of the memory that is free, is left out, and the table says so.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import page
from benchmarks.machine import processor, resident
from retrace.analyze.exact.reference import exact_pass
from retrace.analyze.units.unit import Block, HeadGroup, Unit, load_units
from retrace.traces import LayerRules, open_trace

SDPA = "SDPA forward"
MATRICES = "two matrices and sets"


def main() -> None:
    """Measure, print a table, and write it where asked."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    points = []
    for positions in arguments.positions or [None]:
        units = _units(arguments, positions)
        points += _point(units, arguments, points)
    page.publish(_table(points, units, arguments), arguments.out)
    if arguments.plot:
        _plot(points, arguments.plot, _machine(arguments))


@dataclass(frozen=True)
class Point:
    """One way at one length and budget."""

    positions: int
    way: str
    k: int | None
    ms: float = float("nan")
    mib: float = float("nan")
    left_out: str = ""
    """Why it was not run."""


def _point(
    units: list[Unit], arguments: argparse.Namespace, shorter: Sequence[Point]
) -> list[Point]:
    """Every way over the same tensors."""
    dtype, length = units[0].dtype, len(units[0].keys)
    keys = torch.stack([unit.keys for unit in units]).to(dtype)
    queries = torch.cat([unit.queries for unit in units]).to(dtype)
    values = torch.stack([unit.values for unit in units]).to(dtype)
    ways: list[tuple[str, int | None, Callable[[], object]]] = [
        (SDPA, None, lambda: _sdpa(queries, keys, values))
    ]
    for k in arguments.topk:
        if not keys.is_cuda:
            ways.append((MATRICES, k, partial(two_matrices, queries, keys, values, k)))
        ways.append(("plain blocks", k, partial(_plain_blocks, units, k)))
        ways.append(("retrace exact pass", k, partial(_exact_pass, units, k, arguments.threads)))
    points = []
    for way, k, run in ways:
        before = [p for p in shorter if (p.way, p.k) == (way, k)][-1:]
        reason = ""
        if before and not before[0].left_out:
            seconds = before[0].ms / 1e3 * (length / before[0].positions) ** 2
            if seconds > arguments.limit:
                reason = f"would take about {seconds:.0f} s"
        elif before:
            reason = "left out at a shorter length"
        # Scores, hidden ones, the selected ones and a softmax.
        if way == MATRICES and 2 * 16 * queries.shape[0] * length**2 > _free_bytes():
            reason = "does not fit"
        if reason:
            points.append(Point(length, way, k, left_out=reason))
        else:
            repeat = 1 if way == MATRICES else arguments.repeat
            points.append(Point(length, way, k, *_least(run, repeat, arguments.limit)))
    return points


def _parse() -> argparse.Namespace:
    parser = page.parser(__doc__)
    parser.add_argument("--trace", type=Path, help="a trace; random tensors if left out")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--sequence", type=int, default=0)
    parser.add_argument("--topk", type=int, nargs="+", default=[10, 64, 256])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--positions", type=int, nargs="+", help="of random tensors: 2048, on a GPU 32768"
    )
    parser.add_argument("--alike", type=int, default=0, help="neighbouring random keys alike")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=60, help="seconds of one run at most")
    parser.add_argument("--plot", type=Path, help="draw the times over the positions")
    return parser.parse_args()


def _units(arguments: argparse.Namespace, positions: int | None) -> list[Unit]:
    device = arguments.device
    if arguments.trace:
        layer = open_trace(arguments.trace).layer(arguments.layer)
        return list(load_units(layer, arguments.sequence, device))
    heads, kv_heads, channels, length, dtype = (
        (9, 3, 64, 2048, torch.float32)
        if device.type == "cpu"
        else (32, 8, 128, 32768, torch.bfloat16)
    )
    length = positions or length
    group = heads // kv_heads
    rules = LayerRules("random", heads, kv_heads, channels, channels, channels**-0.5)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    units = []
    for kv_head in range(kv_heads):
        queries, keys = 2 * random(group, length, channels), 2 * random(length, channels)
        if arguments.alike:
            centers = 2 * random(200, channels)
            runs = torch.randint(200, (-(-length // arguments.alike),), device=device)
            near = centers[runs].repeat_interleave(arguments.alike, 0)[:length]
            keys = near + 0.15 * keys
            queries = 0.35 * queries + centers[torch.randint(200, (group, length), device=device)]
        values = random(length, channels)
        tensors = [t.to(dtype).float() for t in (queries, keys, values)]
        positions = torch.arange(length, device=device)
        head_group = HeadGroup(0, 0, kv_head, rules)
        unit = Unit(head_group, tensors[0], positions, *tensors[1:], None, dtype=dtype)
        units.append(unit)
    return units


def _least(run: Callable[[], object], repeat: int, limit: float) -> tuple[float, float]:
    """Milliseconds of the fastest of `repeat` runs, after one to warm up, or of as many as begin
    within `limit` seconds; and MiB that one takes at most beside its inputs."""
    times: list[float] = []
    extra, begin = 0, time.perf_counter()
    with torch.inference_mode():
        for _ in range(repeat + 1):
            if times and time.perf_counter() - begin > limit:
                break
            before = _memory_begins()
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            extra = _memory_at_most() - before
    return min(times[1:] or times) * 1e3, extra / 2**20


def _memory_begins() -> int:
    """Bytes in use, from where on the most in use is counted anew."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    return resident("VmRSS")


def _memory_at_most() -> int:
    """Bytes in use at most since."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    group = len(queries) // len(keys)
    return torch.nn.functional.scaled_dot_product_attention(
        queries[None],
        keys.repeat_interleave(group, 0)[None],
        values.repeat_interleave(group, 0)[None],
        is_causal=True,
    )


def two_matrices(queries: Tensor, keys: Tensor, values: Tensor, k: int) -> float:
    """Recall and error of the k best keys as scripts about one method usually find them.

    Args:
        queries: (heads, positions, channels).
        keys: (kv_heads, positions, channels).
        values: (kv_heads, positions, channels).
        k: the budget.
    """
    group = len(queries) // len(keys)
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    hidden = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).triu(1)
    scores = (queries @ keys.mT * queries.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    output = torch.softmax(scores, -1) @ values
    best = scores.topk(k, dim=-1).indices
    selected = torch.full_like(scores, -torch.inf).scatter(-1, best, scores.gather(-1, best))
    approximate = torch.softmax(selected, -1) @ values
    exact_sets = scores.topk(k, dim=-1).indices.tolist()
    recall = 0.0
    for ours, theirs in zip(best.tolist(), exact_sets, strict=True):
        for found, wanted in zip(ours, theirs, strict=True):
            recall += len(set(found) & set(wanted)) / k
    return recall + float((output - approximate).norm())


def _plain_blocks(units: list[Unit], k: int) -> None:
    rows = 512 if units[0].keys.is_cuda else 128
    for unit in units:
        keys, values = unit.keys.to(unit.dtype), unit.values.to(unit.dtype)
        for start in range(0, len(unit.positions), rows):
            positions = unit.positions[start : start + rows]
            end = int(positions[-1]) + 1
            queries = unit.queries[:, start : start + rows].to(unit.dtype)
            scores = (queries @ keys[:end].T).float()
            scores *= unit.group.rules.scale
            places = torch.arange(end, device=positions.device)
            scores.masked_fill_(places > positions[:, None], -torch.inf)
            best = scores.topk(min(k, end), dim=-1).values
            weights = torch.exp(scores - best[..., :1])
            (weights.to(unit.dtype) @ values[:end]) / weights.sum(-1, keepdim=True)


def _exact_pass(units: list[Unit], k: int, threads: int) -> None:
    if units[0].keys.is_cuda:
        for unit in units:
            # Kernels hold no scores, so that their block may be the whole unit.
            exact_pass(Block(unit, slice(0, len(unit.positions))), k)
        return
    # One thread per core, each with arithmetic of one thread, as `analyze` runs.
    one = partial(torch.set_num_threads, 1)

    def run(part: tuple[Unit, slice]) -> None:
        exact_pass(Block(*part), k)  # a block goes with its scores

    with ThreadPoolExecutor(threads, initializer=one) as pool:
        for _ in pool.map(run, [(unit, block.rows) for unit in units for block in unit.blocks(0)]):
            pass
    torch.set_num_threads(threads)


def _table(points: list[Point], units: list[Unit], arguments: argparse.Namespace) -> str:
    base = {point.positions: point.ms for point in points if point.way == SDPA}
    lengths = f"{', '.join(map(str, base))} positions"
    shape = (
        f"{units[0].group.rules.heads} heads, {len(units)} kv heads, {lengths}, "
        f"{units[0].keys.shape[1]} channels, {str(units[0].dtype).removeprefix('torch.')}"
    )
    source = f"layer {arguments.layer} of {arguments.trace.name}" if arguments.trace else "random"
    if arguments.alike:
        source += f", {arguments.alike} neighbouring keys alike"
    rows = [["positions", "what", "k up to", "ms", "times SDPA", "MiB"], ["---"] * 6]
    left_out: dict[tuple[str, int | None], str] = {}
    for p in points:
        if p.left_out:
            why = f"{p.way}{'' if p.k is None else f' up to {p.k}'}, {p.positions:,} positions"
            left_out.setdefault((p.way, p.k), f"{why}: {p.left_out}")
            continue
        ratio = p.ms / base[p.positions]
        rows.append([f"{p.positions:,}", p.way, str(p.k or ""), f"{p.ms:.1f}"])
        rows[-1].append("" if isnan(ratio) else f"{ratio:.1f}")
        rows[-1].append(f"{max(p.mib, 0):,.0f}")
    lines = [f"{_machine(arguments)}; {source}: {shape}.", ""]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if left_out:
        lines += ["", f"Left out, as is what is longer: {'; '.join(left_out.values())}."]
    return "\n".join(lines)


def _plot(points: list[Point], path: Path, machine: str) -> None:
    """Milliseconds over positions, both logarithmic, a line for each way and budget."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for way, k in dict.fromkeys((p.way, p.k) for p in points):
        line = [p for p in points if (p.way, p.k) == (way, k) and not p.left_out]
        label = way if k is None else f"{way}, k = {k}"
        axes.plot([p.positions for p in line], [p.ms for p in line], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("positions")
    axes.set_ylabel("ms a layer")
    axes.set_title(machine, fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _machine(arguments: argparse.Namespace) -> str:
    name = processor(arguments.device)
    return f"{name}, {arguments.threads} threads, torch {torch.__version__}"


if __name__ == "__main__":
    main()
