"""Bytes are those of a cache as it is served, whatever the trace holds, with all that a query
reads to be compared."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from retrace.analyze import Results, analyze, parse_spec
from retrace.analyze.units.costs import serving_words
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
KEYS, GROUP, KV_HEADS, CHANNELS, E = 100, 3, 2, 16, 2
"""Visible keys, heads of a group, kv heads, channels of a key, and bytes of an element."""

PROJECTED: dict[str, float] = {
    "loki:rank=4": (KEYS + CHANNELS) * 4 * E,
    "infinigen:columns=0.25": GROUP * (KEYS + CHANNELS) * 4 * E,
    "hata:bits=24": KEYS * 24 / 8 + CHANNELS * 24 * E,
    # Of 16 channels and a constant to 5, of 5 and a constant to 5, and so to 8 bits.
    "hashattention:bits=8,hidden=5": GROUP * (KEYS + (17 * 5 + 6 * 5 + 6 * 8) * E),
    "socket:tables=3,bits=4": KEYS * (12 / 8 + 2) + CHANNELS * 12 * E,
    "magicpig:tables=8,bits=2": KEYS * 4 * GROUP * 8 / 2**2 + CHANNELS * 16 * E,
    # All 100 keys in signs, half of them in four bits and a weight for each eight channels.
    "pariskv": KEYS * 2 + KEYS / 2 * (8 + 2 * 2) + 2,
    # The codes of four of 16 channels, and which they are.
    "double-sparsity:gamma=4,bits=4": GROUP * 4 * (KEYS / 2 + 2),
    "linear-completion:features=6": KEYS * CHANNELS * E + 6 * 17 * E + GROUP * 6 * 17 * E,
    "dsa-indexer:heads=3,channels=8": (
        (KEYS * (8 + 4) + 3 * (GROUP * KV_HEADS * CHANNELS * 9 + 1) * E) / KV_HEADS
    ),
    "seerattention-r": 2 * CHANNELS * E + GROUP * CHANNELS * CHANNELS * E,
}
"""Bytes that a query's group reads to find its keys, counted by hand."""


@pytest.mark.parametrize("spec", PROJECTED)
def test_what_a_query_is_turned_by_is_read_with_it(rules: Any, spec: str) -> None:
    layer = rules(heads=GROUP * KV_HEADS, kv_heads=KV_HEADS, key_dim=CHANNELS, value_dim=CHANNELS)
    read = parse_spec(spec).method.aux_bytes(None, torch.tensor([KEYS]), HeadGroup(0, 0, 0, layer))
    assert float(torch.as_tensor(read)) == PROJECTED[spec]


def bytes_of(results: Results) -> pd.Series:
    rows = results.metrics
    return rows[rows["metric"] == "bytes_ratio"].set_index(["method", "layer", "head"])["mean"]


def test_the_traces_dtype_does_not_matter(make_trace: MakeTrace, rules: Any) -> None:
    """The same numbers, held in four bytes and in two."""
    layers = [rules(heads=4), rules(window=20)]
    rng = np.random.default_rng(0)
    tensors = {
        (i, 0): tuple(
            np.round(rng.normal(size=(heads, 60, 8)) * 8) / 8  # exact in bfloat16
            for heads in (layer.heads, layer.kv_heads, layer.kv_heads)
        )
        for i, layer in enumerate(layers)
    }
    methods = ["exact", "quest:page=4", "low-bit", "socket:tables=2,bits=3", "pqcache:keep=none"]
    found = [
        analyze(
            make_trace(layers, [60], dtype=dtype, tensors=tensors, name=dtype),
            methods,
            [6],
            min_context=20,
            keep_exact=False,
        )
        for dtype in ("float32", "bfloat16")
    ]
    pd.testing.assert_series_equal(*map(bytes_of, found))
    for results in found:
        assert results.run["serving_dtype"] == "bfloat16"
        assert "bytes of a cache in bfloat16" in results.markdown()


def test_older_results_say_what_they_were_counted_in(
    make_trace: MakeTrace, rules: Any, tmp_path: Any
) -> None:
    trace = make_trace(rules(), [60])
    results = analyze(trace, ["exact"], [4], min_context=20, keep_exact=False)
    del results.run["serving_dtype"]
    assert "bytes of a cache in the trace's float32" in results.summary_title()
    assert serving_words(results.run) in results.summary_title()
    results.save(tmp_path / "old")
    with pytest.raises(RetraceError, match="results of another serving_dtype"):
        analyze(trace, ["window"], [4], min_context=20, keep_exact=False, out=tmp_path / "old")
