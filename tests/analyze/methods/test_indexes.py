"""Vector indexes of real libraries: exact where they search all, and no better for less."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import analyze, parse_spec
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Block, Unit, load_units
from retrace.traces import Trace

MakeTrace = Callable[..., Trace]
LENGTH = 300


def needs(spec: str) -> None:
    extra = parse_spec(spec).method.extra
    assert extra is not None
    pytest.importorskip(extra, reason=f"{extra} is not installed")


@pytest.fixture
def unit(make_trace: MakeTrace, rules: Any) -> Unit:
    """A group of two heads whose keys do not tie."""
    trace = make_trace(rules(heads=2, kv_heads=1, key_dim=8), [LENGTH])
    [unit] = load_units(trace.layer(0), 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    return replace(
        unit,
        keys=torch.randn(unit.keys.shape, generator=generator),
        queries=torch.randn(unit.queries.shape, generator=generator),
    )


def figures(unit: Unit, spec: str, k: int = 10) -> tuple[float, float]:
    """Recall and bytes read to find keys of the last queries, from an index of the keys before."""
    method = parse_spec(spec).method
    block = Block(unit, slice(LENGTH - 40, LENGTH))
    states = States(method, unit, Protocol(prefix=LENGTH - 40))
    hits, read = [], []
    for served in states.serve(block):
        part = served.block
        [selection] = select(method, served, part, [k])
        best = part.scores.topk(k, dim=-1).indices
        for ours, theirs in zip(
            selection.ids.flatten(0, 1).tolist(), best.flatten(0, 1).tolist(), strict=True
        ):
            hits.append(len(set(ours) & set(theirs)) / k)
        read += torch.as_tensor(selection.aux_bytes).flatten().tolist()
    return float(np.mean(hits)), float(np.mean(read))


@pytest.mark.parametrize(
    "spec",
    [
        "flat",
        "ivf:nprobe=1000",
        "ivf:nlist=3,nprobe=3,codes=sq8",
        "ivf-pq:nprobe=1000,rerank=300",
        "usearch:ef=300",
        "hnswlib:ef=300",
        "hnsw:ef=300",
    ],
)
def test_a_search_of_everything_is_exact(unit: Unit, spec: str) -> None:
    needs(spec)
    recall, _ = figures(unit, spec)
    assert recall >= (0.95 if "sq8" in spec else 0.999)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("ivf:nlist=20,nprobe=2", "ivf:nlist=20,nprobe=12"),
        ("ivf-pq:nlist=20,nprobe=2", "ivf-pq:nlist=20,nprobe=12"),
        ("ivf-pq:nprobe=99,rerank=1,m=2,bits=3", "ivf-pq:nprobe=99,rerank=8,m=2,bits=3"),
        ("usearch:m=2,ef=1,ef_construction=2", "usearch:m=8,ef=100"),
        ("hnsw:m=2,ef=1,ef_construction=2", "hnsw:m=8,ef=100"),
        ("hnswlib:m=2,ef=1,ef_construction=2", "hnswlib:m=8,ef=100"),
    ],
)
def test_what_is_searched_is_found_and_paid_for(unit: Unit, less: str, more: str) -> None:
    needs(less)
    (few, cheap), (many, dear) = figures(unit, less), figures(unit, more)
    assert few < many
    assert cheap < dear


def test_flat_reads_every_key_and_finds_what_exact_does(make_trace: MakeTrace, rules: Any) -> None:
    needs("flat")
    trace = make_trace(rules(heads=1, kv_heads=1), [90])
    rows = analyze(trace, ["flat", "exact"], [4], min_context=40, keep_exact=False).metrics
    means = rows.pivot_table("mean", "metric", "method")
    for metric in ("bytes_ratio", "attention_fraction"):
        np.testing.assert_allclose(means.loc[metric, "flat"], means.loc[metric, "exact"], atol=1e-4)


def test_inverted_lists_read_what_they_search(unit: Unit) -> None:
    needs("ivf")
    group = unit.group
    _, read = figures(unit, "ivf:nlist=4,nprobe=4,step=1000")
    indexed, heads = LENGTH - 40, len(unit.queries)
    since = np.mean(np.arange(1, 41))  # keys that have not joined are read besides
    assert read == (4 + heads * indexed + since) * group.key_bytes
