"""Percentiles over queries and worst queries, against NumPy over every query."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import Results, analyze
from retrace.analyze.metrics.histogram import RESOLUTION
from retrace.analyze.metrics.registry import TAILED
from retrace.analyze.metrics.tails import PERCENTILES, EveryQuery, Tails, tails_of
from retrace.traces import Trace

MakeTrace = Callable[..., Trace]
ERROR = TAILED.index("error_norm")
BUDGETS, HEADS = 2, 3


def drawn(queries: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Figures (budgets, `TAILED`, heads, queries): shares crowd at 0 and 1, errors span decades."""
    generator = np.random.default_rng(seed)
    figures = generator.beta(0.3, 0.1, (BUDGETS, len(TAILED), HEADS, queries))
    figures[:, ERROR] = generator.lognormal(0, 2, (BUDGETS, HEADS, queries))
    figures[:, :, :, generator.integers(queries)] = np.nan  # does not count
    return figures.astype(np.float32)


def test_percentiles_are_those_of_every_query() -> None:
    parts = [drawn(n, seed) for seed, n in enumerate((200, 31, 5))]
    tails = [Tails.of(p, np.arange(10, 10 + p.shape[-1]), i) for i, p in enumerate(parts)]
    whole = np.concatenate(parts, axis=-1)
    merged = tails[0].merge(tails[1]).merge(tails[2])
    assert (merged.counts() == (~np.isnan(whole)).sum(axis=-1)).all()
    for percent in (0, *PERCENTILES, 100):
        found, right = merged.percentile(percent), np.nanpercentile(whole, percent, axis=-1)
        known_to = np.minimum(right, 1 - right)
        known_to[:, ERROR] = right[:, ERROR]
        # Between two samples each end has its own bound, so that of the larger one holds.
        lower = np.nanpercentile(whole, percent, axis=-1, method="lower")
        higher = np.nanpercentile(whole, percent, axis=-1, method="higher")
        for end in (lower, higher):
            other = np.minimum(end, 1 - end)
            other[:, ERROR] = end[:, ERROR]
            known_to = np.maximum(known_to, other)
        assert (np.abs(found - right) <= 1.01 * RESOLUTION * known_to + 2.0**-16).all(), percent


def test_the_worst_query_is_the_first_of_the_worst() -> None:
    parts = [drawn(n, seed) for seed, n in enumerate((40, 7))]
    for part in parts:  # as bad in both, twice
        part[0, 0, 0, [3, 5]] = 0.0
        part[0, ERROR, 0, [2, 6]] = 1e5
    tails = [Tails.of(p, np.arange(100, 100 + p.shape[-1]), i) for i, p in enumerate(parts)]
    for merged in (tails[0].merge(tails[1]), tails[1].merge(tails[0])):
        for b, m, h in np.ndindex(merged.worst.figure.shape):
            every = [
                (f if m == ERROR else -f, -i, -q, f)
                for i, part in enumerate(parts)
                for q, f in enumerate(part[b, m, h])
                if not np.isnan(f)
            ]
            _, sequence, query, figure = max(every)
            at = merged.worst
            assert at.figure[b, m, h] == figure
            assert (at.sequence[b, m, h], at.position[b, m, h]) == (-sequence, 100 - query)
        assert merged.worst.position[0, 0, 0] == 103 and merged.worst.position[0, ERROR, 0] == 102


def test_budgets_among_more_of_them() -> None:
    figures, positions = drawn(30, 2), np.arange(50, 80)
    narrow = Tails.of(figures, positions, 4)
    told = EveryQuery(figures, positions, 4).spread([0, 2], 3)
    for wide in (narrow.spread([0, 2], 3), tails_of([told])):
        assert (wide.counts()[1] == 0).all() and (wide.worst.sequence[1] == -1).all()
        for part in ("figure", "sequence", "position"):
            ours, theirs = (getattr(one.worst, part) for one in (wide, narrow))
            np.testing.assert_array_equal(ours[[0, 2]], theirs)
        np.testing.assert_array_equal(wide.percentile(95)[[0, 2]], narrow.percentile(95))


def test_nothing_counts() -> None:
    nothing = np.full((BUDGETS, len(TAILED), HEADS, 4), np.nan, np.float32)
    tails = Tails.of(nothing, np.arange(4), 0)
    assert (tails.worst.sequence == -1).all() and np.isnan(tails.percentile(50)).all()
    some = Tails.of(drawn(9, 1), np.arange(9), 3)
    both = tails.merge(some)
    assert (both.worst.sequence == 3).all()
    np.testing.assert_array_equal(both.percentile(95), some.percentile(95))


def test_the_table(make_trace: MakeTrace, rules: Any, queries_of: Any, tmp_path: Path) -> None:
    """Of whole runs, by any number of workers."""
    trace = make_trace(rules(heads=4, kv_heads=2), [53, 24], name="own")
    for name, how in (("one", {}), ("four", {"workers": 4})):
        analyze(trace, ["exact"], [2, 3], min_context=7, out=tmp_path / name, **how)
    one, four = (Results.load(tmp_path / name).tails for name in ("one", "four"))
    assert len(one) == 2 * len(TAILED) * 4
    pd.testing.assert_frame_equal(one, four)
    every: dict[tuple[int, int], list[float]] = {}
    for group in queries_of(trace):
        for query in group:
            if query.position >= 7:
                for k in (2, 3):
                    figures = query.figures(query.top(k), k)
                    every.setdefault((query.head, k), []).append(figures["error_norm"])
    rows = one[one["metric"] == "error_norm"].set_index(["head", "topk"])
    for at, errors in every.items():
        row = rows.loc[at]
        assert row["count"] == len(errors)
        assert row["worst"] == pytest.approx(max(errors), rel=1e-4)
        assert row["p50"] == pytest.approx(np.median(errors), rel=1.01 * RESOLUTION)
        assert row["p5"] <= row["p50"] <= row["p95"] <= row["worst"] * (1 + RESOLUTION)
