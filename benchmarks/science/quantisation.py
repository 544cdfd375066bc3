"""Published errors of quantised vectors, from the formats that caches are held in.

    python -m benchmarks.science.quantisation --trace t.zarr

TurboQuant (arXiv:2504.19874) needs random unit vectors alone. That keys are better rounded channel
by channel and values token by token (KIVI, arXiv:2402.02750, section 3) is looked for in a trace,
where both have as many scales: in 2 bits, 32 numbers share one.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.page import origin, parser, publish
from retrace.analyze.caches.formats import Format
from retrace.analyze.caches.integers import ByChannel, KIVIValues
from retrace.analyze.caches.turboquant import TurboQuant
from retrace.analyze.units.attention import score, visible
from retrace.analyze.units.unit import Unit, load_units
from retrace.traces import Trace, open_trace

CHANNELS, VECTORS, QUERIES = 1536, 4000, 400
SQUARED = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}
"""Mean squared error of a normal variable by bits (Max, 1960); the paper rounds to 0.36, 0.117,
0.03 and 0.009."""
PRODUCTS = {1: 1.57, 2: 0.56, 3: 0.18, 4: 0.047}
"""Times 1 / channels: mean squared error of inner products (theorem 2)."""
BITS = 2


def main() -> None:
    """Measure, and print the page."""
    arguments = _arguments()
    torch.manual_seed(0)
    parts = [f"Made by {origin()}.", *constants()]
    if arguments.trace is not None:
        parts += rounded_either_way(open_trace(arguments.trace))
    publish("\n".join(parts), arguments.out)


def _arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--trace", type=Path, help="a trace to round keys and values of")
    return options.parse_args()


def constants() -> Iterator[str]:
    """A table of TurboQuant's errors beside those that are published."""
    vectors, queries = (
        torch.nn.functional.normalize(torch.randn(count, CHANNELS), dim=-1)
        for count in (VECTORS, QUERIES)
    )
    yield f"\n{VECTORS:,} random unit vectors of {CHANNELS:,} channels, {QUERIES} random queries:\n"
    yield "| Bits | Squared error | published | Inner products, times channels | published | mean |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for bits, published in SQUARED.items():
        apart = TurboQuant(bits).rounded(vectors) - vectors
        squared = float(apart.double().square().sum(dim=-1).mean())
        unbiased = TurboQuant(bits, unbiased=True).rounded(vectors) - vectors
        products = (queries @ unbiased.T).double()
        error, mean = float(products.square().mean()) * CHANNELS, float(products.mean())
        yield (
            f"| {bits} | {squared:.4f} | {published} | {error:.4f} | {PRODUCTS[bits]} | "
            f"{mean * CHANNELS**0.5:+.4f} |"
        )


def rounded_either_way(trace: Trace) -> Iterator[str]:
    """A table of the errors of keys and values of a trace's first sequence, by channel and by
    token."""
    found: dict[str, list[tuple[float, float]]] = {}
    for index in trace.layers:
        for unit in load_units(trace.layer(index), trace.sequences[0], torch.device("cpu")):
            for name, figures in errors_of(unit).items():
                found.setdefault(name, []).append(figures)
    count = len(next(iter(found.values())))
    yield f"\nMeans over {count} kv heads of the first sequence, {BITS} bits:"
    yield "\n| Relative error of | by channel | by token | kv heads where by channel is less |"
    yield "| --- | --- | --- | --- |"
    for name, pairs in found.items():
        one, other = torch.tensor(pairs).mean(dim=0).tolist()
        less = sum(by_channel < by_token for by_channel, by_token in pairs)
        yield f"| {name} | {one:.3f} | {other:.3f} | {less} of {count} |"


def errors_of(unit: Unit) -> dict[str, tuple[float, float]]:
    """Relative errors of keys, of attention by them, of values and of the output over them, each
    rounded by channel and by token."""
    ways: tuple[Format, Format] = ByChannel(BITS), KIVIValues(BITS)
    whole = len(ways[0].rounded(unit.keys))
    rows = unit.positions < whole
    queries, positions = unit.queries[:, rows], unit.positions[rows]
    hidden = ~visible(positions, torch.arange(whole), unit.group.rules)

    def attention(keys: Tensor) -> Tensor:
        scores = score(queries, keys, unit.group.rules)
        return scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1)

    def both(vectors: Tensor, outcome: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        exact = outcome(vectors)
        apart = [outcome(way.rounded(vectors)) - exact for way in ways]
        return float(apart[0].norm() / exact.norm()), float(apart[1].norm() / exact.norm())

    keys, values = unit.keys[:whole], unit.values[:whole]
    exact = attention(keys)
    return {
        "keys": both(keys, lambda rounded: rounded),
        "attention, by such keys": both(keys, attention),
        "values": both(values, lambda rounded: rounded),
        "output, over such values": both(values, lambda rounded: exact @ rounded),
    }


if __name__ == "__main__":
    main()
