"""Does a method find the needle? Recall and attention mass of the marked evidence, layer by layer.

    retrace capture --pretrained builtin:smollm2 --tasks needle --lengths 4096 --queries last:64 \
        --out needle.zarr
    python examples/evidence.py needle.zarr 128 exact quest snapkv window

Each method holds its state of the prompt where the answer begins, as in decoding, and answers the
queries from there on: those that predict the answer where it is in the trace, or else the prompt's
last one.
"""

import sys
from collections.abc import Sequence

import pandas as pd

from retrace.analyze import analyze
from retrace.traces import Trace, open_trace

FIGURES = ["evidence_recall", "evidence_mass", "evidence_attention"]


def first_query(trace: Trace, sequence: int) -> int:
    """The position whose query begins to write the answer."""
    answer = trace.marks(sequence).get("answer")
    return (answer[0].start if answer else trace.length(sequence)) - 1


def figures(trace: Trace, methods: Sequence[str], k: int) -> pd.DataFrame:
    """`FIGURES` of each method, layer, sequence and head, means over queries."""
    begins = {sequence: first_query(trace, sequence) for sequence in trace.sequences}
    parts = []
    for start in sorted(set(begins.values())):
        others = {s: "begins elsewhere" for s, begin in begins.items() if begin != start}
        results = analyze(
            trace.without(others),
            methods,
            [k],
            protocol=f"prefix:{start}",
            min_context=start,
            evidence="evidence",
            keep_exact=False,
        )
        parts.append(results.sequences)
    rows = pd.concat(parts)
    rows["method"] = pd.Categorical(rows["method"], categories=rows["method"].unique())
    keys = ["method", "layer", "sequence", "head"]
    table = rows.pivot(index=keys, columns="metric", values="mean")[FIGURES]
    return table.rename_axis(columns=None).reset_index()


def main(path: str, k: str, *methods: str) -> None:
    """Print a table of each layer, all heads and sequences together, and of the whole. Of the
    attention that is kept, each head counts by how much it pays the evidence."""
    rows = figures(open_trace(path), methods, int(k))
    rows["kept"] = rows["evidence_mass"] * rows["evidence_attention"]
    rows = pd.concat([rows, rows.assign(layer="all")])
    grouped = rows.groupby(["layer", "method"], sort=False, observed=True)
    means = grouped[[*FIGURES, "kept"]].mean().rename(columns={"evidence_recall": "recall"})
    means["mass kept"] = means["kept"] / means["evidence_attention"]
    table = means[["recall", "mass kept"]].unstack("method", sort=False)
    paid = means["evidence_attention"].groupby("layer", sort=False).first()
    table.insert(0, ("evidence", "mass"), paid)
    print(table.to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main(*sys.argv[1:])
