"""Figures of marked keys, against their definitions in float64, on a CPU and on a GPU."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from retrace.analyze import Results, analyze, merge
from retrace.analyze.metrics.registry import AT_MARKED
from retrace.traces import LayerRules, RetraceError, Trace

MakeTrace = Callable[..., Trace]
LENGTHS = (53, 30, 24)
MARKS = [
    {"evidence": [range(7, 12), range(40, 44)], "other": [range(1)]},
    {},
    {"evidence": [range(18, 21)]},
]
SPANS = {53: {*range(7, 12), *range(40, 44)}, 30: set[int](), 24: {*range(18, 21)}}
"""Marked positions by the length of the sequence."""
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ),
]


def by_definition(
    groups: Sequence[Sequence[Any]], select: Callable[[Any, int], Sequence[int]], k: int, first: int
) -> pd.DataFrame:
    """Mean, std and count by (metric, head), of queries from a position on."""
    samples: dict[tuple[str, int], list[float]] = defaultdict(list)
    for query in (query for group in groups for query in group):
        evidence = SPANS[len(query.keys)] & {int(j) for j in query.visible}
        if query.position < first or not evidence:
            continue
        found = sorted(evidence & set(select(query, k)))
        paid = query.probabilities[sorted(evidence)].sum()
        samples["evidence_recall", query.head].append(len(found) / len(evidence))
        samples["evidence_mass", query.head].append(query.probabilities[found].sum() / paid)
        samples["evidence_attention", query.head].append(paid)
    return pd.DataFrame(
        [(*at, np.mean(x), np.std(x), len(x)) for at, x in samples.items()],
        columns=["metric", "head", "mean", "std", "count"],
    ).set_index(["metric", "head"])


def sinks_and_newest(query: Any, k: int) -> list[int]:
    """The first four positions, the query's own, and the newest others while there is budget."""
    sinks = [int(j) for j in query.visible if j < 4]
    newest = [int(j) for j in reversed(query.visible) if j >= 4]
    return [*sinks, *newest[: max(k - len(sinks), 1)]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 6, 20])
def test_figures(
    make_trace: MakeTrace, any_rules: LayerRules, queries_of: Any, device: str, k: int
) -> None:
    trace = make_trace(any_rules, LENGTHS, marks=MARKS)
    results = analyze(
        trace, ["exact", "window"], [k], min_context=5, device=device, keep_exact=False
    )
    rows = results.metrics[results.metrics["metric"].isin(AT_MARKED)]
    for method, select in (("exact", lambda q, k: q.top(k)), ("window", sinks_and_newest)):
        wanted = by_definition(queries_of(trace), select, k, 5)
        found = rows[rows["method"] == method].set_index(["metric", "head"])
        pd.testing.assert_frame_equal(
            found.loc[wanted.index, ["mean", "std", "count"]],
            wanted,
            check_exact=False,
            check_dtype=False,
            rtol=0,
            atol=2e-6 if device == "cpu" else 2e-5,
        )


def test_identities(make_trace: MakeTrace, any_rules: LayerRules) -> None:
    """All keys hold all of the evidence; and where all is marked it is the attention fraction."""
    marks = [{"evidence": [range(n)]} for n in LENGTHS]
    trace = make_trace(any_rules, LENGTHS, marks=marks)
    results = analyze(trace, ["dense", "quest:page=4"], [3], min_context=0)
    mean = results.metrics.pivot_table("mean", ["method", "head"], "metric")
    dense, quest = mean.loc["dense"], mean.loc["quest:page=4"]
    assert (dense["evidence_recall"] == 1).all()
    np.testing.assert_allclose(dense["evidence_mass"], 1, atol=1e-12)
    np.testing.assert_allclose(quest["evidence_recall"], quest["density"], atol=1e-6)
    np.testing.assert_allclose(quest["evidence_attention"], dense["evidence_attention"])
    if any_rules.sinks is None:  # which have some of the attention
        np.testing.assert_allclose(quest["evidence_attention"], 1, atol=1e-6)
        np.testing.assert_allclose(quest["evidence_mass"], quest["attention_fraction"], atol=1e-6)


def test_shares_of_next_to_no_attention(make_trace: MakeTrace, rules: Any, queries_of: Any) -> None:
    """A query that pays the evidence e^-2000 of its attention keeps a share of that like any."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 40, 8)) for _ in range(3))
    query[..., 0], key[..., 0] = 10, 0
    key[:, 0, 0] = 400
    key[:, 6, 0] = 0.3  # of the marked keys the one that is paid most
    trace = make_trace(
        rules(heads=1, kv_heads=1),
        [40],
        tensors={(0, 0): (query, key, value)},
        marks=[{"evidence": [range(4, 9)]}],
    )
    results = analyze(trace, "window", [6], min_context=9)
    mean = results.metrics.set_index("metric")["mean"]
    assert mean["evidence_attention"] == 0 and mean["evidence_recall"] < 0.2
    shares = []
    for (one,) in queries_of(trace):
        if one.position >= 9:
            paid = np.exp(one.scores[4:9] - one.scores[4:9].max())
            kept = [j in sinks_and_newest(one, 6) for j in range(4, 9)]
            shares.append(paid[kept].sum() / paid.sum())
    assert mean["evidence_mass"] == pytest.approx(np.mean(shares), abs=1e-6) and max(shares) > 0


@pytest.mark.usefixtures("untried")
def test_it_is_the_same_bytes_for_any_number_of_workers(
    make_trace: MakeTrace, rules: Any, tmp_path: Path
) -> None:
    trace = make_trace([rules(heads=4), rules(heads=4, window=9)], LENGTHS, marks=MARKS)
    one, four, merged = (tmp_path / name for name in ("one", "four", "merged"))
    methods = ["exact", "h2o", "quest:page=4"]
    analyze(trace, methods, [2, 5], workers=1, out=one)
    analyze(trace, methods, [2, 5], workers=4, out=four)
    for part in (1, 2):
        analyze(trace, methods, [2, 5], part=(part, 2), out=merged)
    merge([merged])
    for file in one.glob("*.parquet"):
        assert file.read_bytes() == (four / file.name).read_bytes(), file.name
        assert file.read_bytes() == (merged / file.name).read_bytes(), file.name


def test_there_are_none_without_marks(make_trace: MakeTrace, rules: Any) -> None:
    plain = analyze(make_trace(rules(), LENGTHS), "exact", [2], min_context=5)
    marked = make_trace(rules(), LENGTHS, marks=MARKS)
    told = analyze(marked, "exact", [2], min_context=5)
    assert plain.run["evidence"] is None and told.run["evidence"] == "evidence"
    assert not set(AT_MARKED) & set(plain.metrics["metric"])
    assert "Evidence Recall" not in plain.summary() and "Evidence Recall" in told.summary()
    # Nothing else is another.
    rest = told.metrics[~told.metrics["metric"].isin(AT_MARKED)].reset_index(drop=True)
    pd.testing.assert_frame_equal(rest, plain.metrics)
    pd.testing.assert_frame_equal(told.queries(), plain.queries())
    # Sequences of no marked keys have no rows, rather than zeros.
    rows = told.sequences[told.sequences["metric"] == "evidence_mass"]
    assert set(rows["sequence"]) == {0, 2}


def test_a_budget_too_large_for_any_query_that_sees_evidence(
    make_trace: MakeTrace, rules: Any
) -> None:
    trace = make_trace(rules(window=5), [53], marks=[{"evidence": [range(2, 4)]}])
    results = analyze(trace, "exact", [2], min_context=20)
    rows = results.metrics[results.metrics["metric"].isin(AT_MARKED)]
    assert (rows["count"] == 0).all() and rows["mean"].isna().all()


def test_another_mark_is_named(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    trace = make_trace(rules(), LENGTHS, marks=MARKS)
    results = analyze(trace, "exact", [2], min_context=5, evidence="other", out=tmp_path)
    recall = results.metrics[results.metrics["metric"] == "evidence_recall"]
    assert set(recall["count"]) == {53 - 5} and results.run["evidence"] == "other"
    assert Results.load(tmp_path).to_xarray().attrs["evidence"] == "other"
    with pytest.raises(RetraceError, match="holds results of another evidence: choose another"):
        analyze(trace, "window", [2], min_context=5, out=tmp_path)


def test_blocks_of_a_prefill(make_trace: MakeTrace, rules: Any, queries_of: Any) -> None:
    trace = make_trace(rules(), [64], marks=[{"evidence": [range(9, 12)]}])
    results = analyze(trace, "a-shape:block=8", [16], protocol="prefill:8")
    mean = results.metrics.pivot_table("mean", "head", "metric")
    seen = {q.position for group in queries_of(trace) for q in group if q.position >= 9}
    counts = results.metrics.pivot_table("count", "head", "metric")
    assert set(counts["evidence_mass"]) == {len(seen)}
    assert mean["evidence_recall"].between(0.01, 0.99).all()
