"""Does a method find the needle? Recall and attention mass of the marked evidence, layer by layer.

    retrace capture --pretrained builtin:smollm2 --tasks needle --lengths 4096 --queries last:64 \
        --out needle.zarr
    python examples/evidence.py needle.zarr 128 exact quest snapkv window

Each method holds its state of the prompt where the answer begins, as in decoding, and answers the
queries from there on: those that predict the answer where it is in the trace, or else the prompt's
last one.
"""

import sys
from collections.abc import Iterator

import pandas as pd
import torch
from torch import Tensor

from retrace.analyze import parse_spec
from retrace.analyze.methods.specs import MethodSpec
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Block, Unit, load_units
from retrace.traces import Trace, open_trace


def first_query(trace: Trace, sequence: int) -> int:
    """The position whose query begins to write the answer."""
    answer = trace.marks(sequence).get("answer")
    return (answer[0].start if answer else trace.length(sequence)) - 1


def attended(unit: Unit, block: Block, spec: MethodSpec, k: int, start: int) -> Tensor:
    """Which keys a method attends with a budget of k (group, queries, keys)."""
    listed = []
    for served in States(spec.method, unit, Protocol(prefix=start)).serve(block):
        (selection,) = select(spec.method, served, block.part(served.rows), [k])
        ids = selection.ids
        counted = (
            torch.arange(ids.shape[-1]) < selection.attended[0].expand(ids.shape[:2])[..., None]
        )
        mark = torch.zeros(*ids.shape[:2], block.end + 1, dtype=torch.bool)
        mark.scatter_(-1, torch.where(counted & (ids >= 0), ids, block.end), True)
        listed.append(mark[..., :-1])
    return torch.cat(listed, dim=1)


def figures(trace: Trace, specs: list[MethodSpec], k: int) -> Iterator[dict[str, object]]:
    """Of each layer, sequence, head and method: the share of the evidence's keys that it attends,
    and of the attention that exact attention pays them; means over queries."""
    for layer in trace.layers:
        for sequence in trace.sequences:
            start = first_query(trace, sequence)
            keys = [key for span in trace.marks(sequence)["evidence"] for key in span]
            for unit in load_units(trace.layer(layer), sequence, torch.device("cpu")):
                (block,) = unit.blocks(start, sys.maxsize)
                block = block.part(slice(int((block.positions < start).sum()), None))
                paid = torch.softmax(block.scores.double(), dim=-1)[..., keys]
                for spec in specs:
                    found = attended(unit, block, spec, k, start)[..., keys]
                    kept = (paid * found).sum(dim=-1)
                    for head in range(unit.group.rules.group):
                        yield {
                            "layer": layer,
                            "method": str(spec),
                            "recall": float(found[head].double().mean()),
                            "mass": float(paid[head].sum(dim=-1).mean()),
                            "kept": float(kept[head].mean()),
                        }


def main(path: str, k: str, *methods: str) -> None:
    """Print a table of each layer, all heads and sequences together, and of the whole."""
    specs = [parse_spec(method) for method in methods]
    rows = pd.DataFrame(figures(open_trace(path), specs, int(k)))
    rows = pd.concat([rows, rows.assign(layer="all")])
    sums = rows.groupby(["layer", "method"], sort=False)[["recall", "mass", "kept"]].mean()
    sums["mass kept"] = sums["kept"] / sums["mass"]
    table = sums[["recall", "mass kept"]].unstack("method", sort=False)
    table.insert(0, ("evidence", "mass"), sums["mass"].groupby("layer", sort=False).first())
    print(table.to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main(*sys.argv[1:])
