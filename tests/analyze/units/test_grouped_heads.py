"""Grouped heads are heads whose keys and values happen to be the same."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from retrace.analyze import analyze
from retrace.traces import Trace

METHODS = ["exact", "window", "quest:page=4", "loki:basis=own", "exact:keep=recent:2"]
"""Those whose heads select for themselves, from nothing but their own query."""


def test_repeated_kv_heads(make_trace: Callable[..., Trace], rules: Any, tensors: Any) -> None:
    grouped = rules(heads=6, kv_heads=2, window=30, sinks=(0.0, 1.0, 2.0, 3.0, -1.0, 0.5))
    repeated = rules(heads=6, kv_heads=6, window=30, sinks=grouped.sinks)
    query, key, value = tensors(grouped, 60, np.random.default_rng(2))
    a = make_trace(grouped, [60], tensors={(0, 0): (query, key, value)}, name="grouped")
    alone = (query, key.repeat(3, axis=0), value.repeat(3, axis=0))
    b = make_trace(repeated, [60], tensors={(0, 0): alone}, name="repeated")
    ours, theirs = (
        analyze(t, METHODS, [2, 5], min_context=0, keep_exact=False).metrics for t in (a, b)
    )
    keys = ["method", "head", "topk", "metric"]
    ours, theirs = (
        f[f.metric != "bytes_ratio"].set_index(keys).sort_index() for f in (ours, theirs)
    )
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-5, atol=1e-5)


def test_group_reads_the_union(make_trace: Callable[..., Trace], rules: Any, tensors: Any) -> None:
    layer = rules(heads=4, kv_heads=1)
    query, key, value = tensors(layer, 60, np.random.default_rng(2))
    same = query[:1].repeat(4, axis=0)
    apart = make_trace(layer, [60], tensors={(0, 0): (query, key, value)}, name="apart")
    alike = make_trace(layer, [60], tensors={(0, 0): (same, key, value)}, name="alike")
    method = "exact:keep=recent:1"
    apart_rows, alike_rows = (
        analyze(t, [method], [4], keep_exact=False).metrics.set_index("metric")
        for t in (apart, alike)
    )
    # Bytes are those of the group, the same for each of its heads.
    assert apart_rows.loc["bytes_ratio", "mean"].nunique() == 1
    assert alike_rows.loc["bytes_ratio", "mean"].max() < apart_rows.loc["bytes_ratio", "mean"].min()
    wanted = 0.5 + 0.5 * alike_rows.loc["density", "mean"].iloc[0]  # all keys, some values
    np.testing.assert_allclose(alike_rows.loc["bytes_ratio", "mean"], wanted)
