"""Figures of queries told apart by position and by how long ago their state may have been built."""

import json
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrace.analyze import Results, analyze
from retrace.analyze.metrics.buckets import buckets_of, first_of
from retrace.analyze.metrics.moments import Moments
from retrace.analyze.metrics.registry import BUCKETED
from retrace.analyze.tables.columns import POSITION_COLUMNS
from retrace.analyze.units.protocol import Protocol
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
LENGTHS = (53, 1, 40, 24)
LOOSELY: Any = {"check_dtype": False, "check_index_type": False}
DISTANCES: dict[str, Callable[[int, int], int]] = {
    "prefix:20": lambda i, n: i - 20,
    "prefix:0.5": lambda i, n: i - n // 2,
    # Built at 16, 17, 34, 51 keys: 32 would be beyond the 17.
    "all:17": lambda i, n: i - (i // 17 * 17 if i >= 17 else 16 if i == 16 else 0),
}
"""How long before the query at a position of a sequence of some length its state was built."""


def bucket_from(number: int) -> int:
    """The first number of a bucket: 0, 1, 2 to 3, 4 to 7, ..."""
    return max(first for first in (0, *(2**i for i in range(20))) if first <= number)


def sinks_and_newest(query: Any, k: int) -> list[int]:
    """The first four positions, the query's own, and the newest others while there is budget."""
    newest = [query.position, *range(query.position - 1, 3, -1)]
    ids = [*range(min(4, query.position + 1)), *newest[: max(1, k - 4)]]
    return list(dict.fromkeys(ids))


METHODS = {"exact": lambda query, k: query.top(k), "window": sinks_and_newest}


@pytest.mark.parametrize("protocol", DISTANCES)
def test_as_defined(
    make_trace: MakeTrace, rules: Any, queries_of: Callable[..., Any], protocol: str
) -> None:
    trace = make_trace(rules(heads=4, kv_heads=2), LENGTHS)
    found = analyze(
        trace, list(METHODS), [2, 5], protocol=protocol, min_context=13, keep_exact=False
    ).positions
    samples: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for query in (query for group in queries_of(trace) for query in group):
        distance = DISTANCES[protocol](query.position, len(query.keys))
        if query.position < 13 or distance < 0:
            continue
        numbers = {"position": query.position, "distance": distance}
        for (method, select), k in product(METHODS.items(), (2, 5)):
            figures = query.figures(select(query, k), k)
            for metric, (axis, number) in product(BUCKETED, numbers.items()):
                key = (method, query.head, k, metric, axis, bucket_from(number))
                samples[key].append(figures[metric])
    found = found.set_index(["method", "head", "topk", "metric", "axis", "first"])
    assert found.index.is_unique and len(found) == len(samples)
    for key, values in samples.items():
        assert found.loc[key, "count"] == len(values), key
        np.testing.assert_allclose(found.loc[key, "mean"], np.mean(values), atol=2e-5)
        np.testing.assert_allclose(found.loc[key, "std"], np.std(values), atol=2e-5)


@pytest.mark.parametrize("protocol", ["all:16", "prefix:16"])
def test_buckets_together_are_the_whole(make_trace: MakeTrace, rules: Any, protocol: str) -> None:
    """Of methods that select for all budgets at once, for each by itself, and that are rebuilt."""
    trace = make_trace([rules(), rules(window=9)], LENGTHS)
    methods = ["quest:page=4", "loki:basis=own", "tova", "retrieval-attention"]
    results = analyze(trace, methods, [1, 3], protocol=protocol, keep_exact=False)
    keys = ["method", "layer", "module", "head", "topk", "metric"]
    whole = results.metrics[results.metrics["metric"].isin(BUCKETED)].set_index(keys).sort_index()
    rows = results.positions.astype({name: "str" for name in ("method", "module", "metric")})
    rows = rows.assign(total=rows["mean"].astype(float) * rows["count"])
    for _, of_axis in rows.groupby("axis", observed=True):
        sums = of_axis.groupby(keys)[["total", "count"]].sum().sort_index()
        pd.testing.assert_series_equal(sums["count"], whole["count"], **LOOSELY)
        np.testing.assert_allclose(sums["total"] / sums["count"], whole["mean"], rtol=1e-5)


@settings(deadline=None)
@given(st.integers(1, 3000), st.sampled_from(["all", "all:17", "prefix:9", "prefix:0.3"]))
def test_buckets_double(length: int, text: str) -> None:
    protocol = Protocol.parse(text)
    positions = torch.arange(min(protocol.first_query(length), length), length)
    buckets = buckets_of(positions, length, protocol)
    built = [protocol.built_at(position, length) for position in positions.tolist()]
    for numbers, of_axis in zip((positions, positions - torch.tensor(built)), buckets, strict=True):
        firsts = [first_of(bucket) for bucket in of_axis.tolist()]
        assert firsts == [bucket_from(number) for number in numbers.tolist()]


def test_moments_of_buckets_are_those_of_their_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 40, generator=generator) + 100
    values[0, 1, 5] = torch.nan
    counted = torch.rand(3, 40, generator=generator) < 0.7
    bucket = torch.randint(0, 4, (40,), generator=generator)
    found = Moments.of_buckets(values, counted, bucket, 6)
    for b in range(6):
        wanted = Moments.of(values, counted & (bucket == b))
        for part in ("count", "mean", "squares"):
            np.testing.assert_allclose(
                getattr(found, part)[b], getattr(wanted, part), rtol=1e-9, atol=1e-9
            )


def test_added_to_and_kept(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    trace = make_trace(rules(), LENGTHS)
    for methods, topk in ((["exact"], [2]), (["window", "exact"], [2, 3])):
        grown = analyze(trace, methods, topk, out=tmp_path / "r", keep_exact=False)
    whole = analyze(trace, ["exact", "window"], [2, 3], min_context=20, keep_exact=False)
    kept = Results.load(tmp_path / "r").positions
    pd.testing.assert_frame_equal(kept, grown.positions)
    names = ["method", "head", "topk", "metric", "axis", "first"]
    one, other = (
        rows.astype({name: "str" for name in ("method", "module", "metric", "axis")})
        .sort_values(names, ignore_index=True)
        for rows in (kept, whole.positions)
    )  # fmt: skip
    pd.testing.assert_frame_equal(one, other)
    assert set(grown.without({"window"}).positions["method"]) == {"exact"}


def test_results_of_earlier_versions_have_none(
    make_trace: MakeTrace, rules: Any, tmp_path: Path
) -> None:
    analyze(make_trace(rules(), LENGTHS), ["exact"], [2], out=tmp_path / "r", keep_exact=False)
    table, facts = tmp_path / "r" / "positions.parquet", tmp_path / "r" / "run.json"
    table.unlink()
    with pytest.raises(RetraceError, match="not a results folder"):
        Results.load(tmp_path / "r")  # not without a word
    run = json.loads(facts.read_text())
    del run["tables"]["positions.parquet"]
    facts.write_text(json.dumps(run))
    results = Results.load(tmp_path / "r")
    assert results.positions.empty and list(results.positions) == list(POSITION_COLUMNS)
    newer = analyze(
        make_trace(rules(), LENGTHS), ["window"], [2], out=tmp_path / "r", keep_exact=False
    )
    assert set(newer.positions["method"]) == {"window"}
