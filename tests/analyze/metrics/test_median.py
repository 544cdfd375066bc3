"""The median error norm beside the mean: against the definitions, however the work is cut."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import Results, analyze
from retrace.analyze.metrics.histogram import RESOLUTION
from retrace.analyze.metrics.measure import plain_tally
from retrace.analyze.metrics.registry import MEDIAN
from retrace.traces import Trace

MakeTrace = Callable[..., Trace]


def medians_of(results: Results) -> pd.DataFrame:
    """Medians (and counts) by method, budget, layer and head."""
    rows = results.metrics[results.metrics["metric"] == MEDIAN]
    return rows.set_index(["method", "topk", "layer", "head"])[["mean", "count"]].sort_index()


def test_against_the_definition(make_trace: MakeTrace, any_rules: Any, queries_of: Any) -> None:
    trace = make_trace([any_rules, any_rules], [53, 44])
    found = medians_of(analyze(trace, ["exact"], [2, 4], keep_exact=False))
    samples = defaultdict(list)
    for layer in trace.layers:
        for query in (query for group in queries_of(trace, layer) for query in group):
            if query.position < 40:
                continue
            for k in (2, 4):
                error = query.figures(query.top(k), k)["error_norm"]
                samples["exact", k, layer, query.head].append(error)
    assert set(samples) == set(found.index)
    for at, errors in samples.items():
        assert found.loc[at, "count"] == len(errors) == 13 + 4
        wanted = np.median(errors)
        assert found.loc[at, "mean"] == pytest.approx(wanted, rel=1.1 * RESOLUTION, abs=2e-6)


def test_without_the_compiled_loop(
    make_trace: MakeTrace, rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = make_trace(rules(heads=4), [53, 61])
    ours = medians_of(analyze(trace, ["quest:page=4"], [2, 5], keep_exact=False))
    monkeypatch.setattr("retrace.analyze.replay.engine.tally", plain_tally)
    plain = medians_of(analyze(trace, ["quest:page=4"], [2, 5], keep_exact=False))
    pd.testing.assert_frame_equal(ours, plain, rtol=2.1 * RESOLUTION)


def test_parts_come_to_the_same(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    """Of budgets that count their own queries as well, and of a sequence that has none."""
    from retrace.analyze import merge

    trace = make_trace([rules(), rules(window=9)], [53, 24, 9], name="own")
    asked: dict[str, Any] = {"min_context": "each", "keep_exact": False}
    whole = analyze(trace, ["exact", "quest"], [1, 2, 4], **asked)
    for part in (1, 2, 3):
        analyze(trace, ["exact", "quest"], [1, 2, 4], out=tmp_path / "r", part=(part, 3), **asked)
    pd.testing.assert_frame_equal(medians_of(merge([tmp_path / "r"])), medians_of(whole))


def test_where_it_stands(make_trace: MakeTrace, rules: Any) -> None:
    results = analyze(make_trace(rules(heads=4)), ["window"], [2], keep_exact=False)
    mean = medians_of(results)["mean"].mean()
    assert results.summary()["Error Norm Median"].tolist() == [f"{mean:.4f}"]
    assert results.layers("window", 2)["Median Error Norm"].tolist() == [pytest.approx(mean)]
    assert "Median Error Norm" in results.markdown()
    earlier = results.metrics[results.metrics["metric"] != MEDIAN]
    before = Results(earlier, results.curves, results.run, results.sequences)
    assert "Median" not in before.markdown() + " ".join(before.layers("window", 2).columns)
