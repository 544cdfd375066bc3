"""How long the exact pass takes beside attention itself, on the same tensors in one run.

    python benchmarks/replay.py --trace t.zarr --layer 10

Without a trace it takes random tensors of SmolLM2's shape. Compared are, for one layer:

- SDPA: `torch.nn.functional.scaled_dot_product_attention`, forward, causal: what a model pays;
- two matrices: scores and their copy without the unselected keys, both whole, and recall from sets,
  query by query: the way that scripts about one method usually go;
- plain blocks: scores of a block of queries, `torch.topk` and a softmax;
- retrace: the exact pass, with ties settled, output, normalizer and every budget up to k.

Each is run `--repeat` times after one to warm up; the least time counts. Ratios are to SDPA.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from retrace.analyze.reference import exact_pass
from retrace.analyze.unit import HeadGroup, Unit, load_units
from retrace.traces import LayerRules, open_trace


def main() -> None:
    """Measure, print a table, and write it where asked."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    units = _units(arguments)
    keys = torch.stack([unit.keys for unit in units])
    queries = torch.cat([unit.queries for unit in units])
    values = torch.stack([unit.values for unit in units])
    rows = [("SDPA forward", None, _least(lambda: _sdpa(queries, keys, values), arguments.repeat))]
    for k in arguments.topk:
        for name, run in (
            ("two matrices and sets", lambda k=k: _two_matrices(queries, keys, values, k)),
            ("plain blocks", lambda k=k: _plain_blocks(units, k)),
            ("retrace exact pass", lambda k=k: _exact_pass(units, k)),
        ):
            slow = name.startswith("two")
            rows.append((name, k, _least(run, 1 if slow else arguments.repeat)))
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
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    return parser.parse_args()


def _units(arguments: argparse.Namespace) -> list[Unit]:
    if arguments.trace:
        layer = open_trace(arguments.trace).layer(arguments.layer)
        return list(load_units(layer, arguments.sequence, torch.device("cpu")))
    torch.manual_seed(0)
    rules = LayerRules("random", 9, 3, 64, 64, 64**-0.5)
    positions = torch.arange(2048)
    return [
        Unit(
            HeadGroup(0, 0, kv_head, rules, 4),
            torch.randn(3, 2048, 64) * 2,
            positions,
            torch.randn(2048, 64) * 2,
            torch.randn(2048, 64),
            None,
        )
        for kv_head in range(3)
    ]


def _least(run: Callable[[], object], repeat: int) -> float:
    """Milliseconds of the fastest of `repeat` runs, after one to warm up."""
    times = []
    with torch.inference_mode():
        for _ in range(repeat + 1):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return min(times[1:]) * 1e3


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


def _plain_blocks(units: list[Unit], k: int, rows: int = 128) -> None:
    for unit in units:
        for start in range(0, len(unit.positions), rows):
            positions = unit.positions[start : start + rows]
            end = int(positions[-1]) + 1
            scores = unit.queries[:, start : start + rows] @ unit.keys[:end].T
            scores *= unit.group.rules.scale
            scores.masked_fill_(torch.arange(end) > positions[:, None], -torch.inf)
            best = scores.topk(min(k, end), dim=-1).values
            weights = torch.exp(scores - best[..., :1])
            (weights @ unit.values[:end]) / weights.sum(-1, keepdim=True)


def _exact_pass(units: list[Unit], k: int) -> None:
    for unit in units:
        for block in unit.blocks(0):
            exact_pass(block, k)


def _table(
    rows: list[tuple[str, int | None, float]], units: list[Unit], arguments: argparse.Namespace
) -> str:
    base = rows[0][2]
    shape = (
        f"{units[0].group.rules.heads} heads, {len(units)} kv heads, "
        f"{len(units[0].keys)} positions, {units[0].keys.shape[1]} channels, float32"
    )
    source = f"layer {arguments.layer} of {arguments.trace.name}" if arguments.trace else "random"
    lines = [
        f"{_processor()}, {arguments.threads} threads, torch {torch.__version__}; "
        f"{source}: {shape}.",
        "",
        "| what | k up to | ms | times SDPA |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {name} | {k or ''} | {ms:.1f} | {ms / base:.1f} |" for name, k, ms in rows]
    return "\n".join(lines)


def _processor() -> str:
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(
            line.split(":")[1].strip() for line in facts.splitlines() if "model name" in line
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
