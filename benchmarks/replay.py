"""How long the exact pass takes beside attention itself, on the same tensors in one run.

    python benchmarks/replay.py --trace t.zarr --layer 10

    python benchmarks/replay.py --device cuda --topk 64 256 --alike 64

Without a trace it takes random tensors: of SmolLM2's shape in float32, or on a GPU of 32 heads over
8 kv heads of 128 channels in bfloat16. `--alike n` makes n neighbouring keys alike, one of 200
clusters that queries lean towards. Compared are, for one layer:

- SDPA: `torch.nn.functional.scaled_dot_product_attention`, forward, causal: what a model pays;
- two matrices: scores and their copy without the unselected keys, both whole, and recall from sets,
  query by query: the way that scripts about one method usually go (not on a GPU);
- plain blocks: scores of a block of queries, `torch.topk` and a softmax;
- retrace: the exact pass, with ties settled, output, normalizer and every budget up to k.

Each is run `--repeat` times after one to warm up; the least time counts. Ratios are to SDPA.
"""

import argparse
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from retrace.analyze.reference import exact_pass
from retrace.analyze.unit import Block, HeadGroup, Unit, load_units
from retrace.traces import LayerRules, open_trace


def main() -> None:
    """Measure, print a table, and write it where asked."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    units = _units(arguments)
    dtype = units[0].dtype
    keys = torch.stack([unit.keys for unit in units]).to(dtype)
    queries = torch.cat([unit.queries for unit in units]).to(dtype)
    values = torch.stack([unit.values for unit in units]).to(dtype)
    on_gpu = keys.is_cuda
    rows = [("SDPA forward", None, *_least(lambda: _sdpa(queries, keys, values), arguments.repeat))]
    for k in arguments.topk:
        for name, run in (
            ("two matrices and sets", lambda k=k: _two_matrices(queries, keys, values, k)),
            ("plain blocks", lambda k=k: _plain_blocks(units, k)),
            ("retrace exact pass", lambda k=k: _exact_pass(units, k, arguments.threads)),
        ):
            slow = name.startswith("two")
            if not (slow and on_gpu):
                rows.append((name, k, *_least(run, 1 if slow else arguments.repeat)))
    text = _table(rows, units, arguments)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, help="a trace; random tensors if left out")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--sequence", type=int, default=0)
    parser.add_argument("--topk", type=int, nargs="+", default=[10, 64, 256])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--positions", type=int, help="of random tensors: 2048, on a GPU 32768")
    parser.add_argument("--alike", type=int, default=0, help="neighbouring random keys alike")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    return parser.parse_args()


def _units(arguments: argparse.Namespace) -> list[Unit]:
    device = arguments.device
    if arguments.trace:
        layer = open_trace(arguments.trace).layer(arguments.layer)
        return list(load_units(layer, arguments.sequence, device))
    heads, kv_heads, channels, length, dtype = (
        (9, 3, 64, 2048, torch.float32)
        if device.type == "cpu"
        else (32, 8, 128, 32768, torch.bfloat16)
    )
    length = arguments.positions or length
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
        itemsize = dtype.itemsize
        head_group = HeadGroup(0, 0, kv_head, rules, itemsize)
        unit = Unit(head_group, tensors[0], positions, *tensors[1:], None, dtype=dtype)
        units.append(unit)
    return units


def _least(run: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Milliseconds of the fastest of `repeat` runs, after one to warm up, and GiB that it takes at
    most beside its inputs, if on a GPU."""
    times = []
    on_gpu = torch.cuda.is_available()
    before = 0
    with torch.inference_mode():
        for _ in range(repeat + 1):
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else 0.0
    return min(times[1:]) * 1e3, extra


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    group = len(queries) // len(keys)
    return torch.nn.functional.scaled_dot_product_attention(
        queries[None],
        keys.repeat_interleave(group, 0)[None],
        values.repeat_interleave(group, 0)[None],
        is_causal=True,
    )


def _two_matrices(queries: Tensor, keys: Tensor, values: Tensor, k: int) -> float:
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
    with ThreadPoolExecutor(threads, initializer=one) as pool:
        blocks = [block for unit in units for block in unit.blocks(0)]
        for _ in pool.map(exact_pass, blocks, [k] * len(blocks)):
            pass
    torch.set_num_threads(threads)


def _table(
    rows: list[tuple[str, int | None, float, float]],
    units: list[Unit],
    arguments: argparse.Namespace,
) -> str:
    base = rows[0][2]
    shape = (
        f"{units[0].group.rules.heads} heads, {len(units)} kv heads, "
        f"{len(units[0].keys)} positions, {units[0].keys.shape[1]} channels, "
        f"{str(units[0].dtype).removeprefix('torch.')}"
    )
    source = f"layer {arguments.layer} of {arguments.trace.name}" if arguments.trace else "random"
    if arguments.alike:
        source += f", {arguments.alike} neighbouring keys alike"
    lines = [
        f"{_processor(arguments.device)}, {arguments.threads} threads, torch {torch.__version__}; "
        f"{source}: {shape}.",
        "",
    ]
    on_gpu = units[0].keys.is_cuda
    head = ["what", "k up to", "ms", "times SDPA", *(["GiB on the GPU"] if on_gpu else [])]
    cells = [head, ["---"] * len(head)]
    for name, k, ms, extra in rows:
        memory = [f"{extra:.1f}"] if on_gpu else []
        cells.append([name, str(k or ""), f"{ms:.1f}", f"{ms / base:.1f}", *memory])
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells])


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(
            line.split(":")[1].strip() for line in facts.splitlines() if "model name" in line
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
