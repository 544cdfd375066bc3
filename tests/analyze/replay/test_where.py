"""`where`: only queries at positions of a phase or mark count, and methods see all as before."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from retrace.analyze import Results, analyze, estimate, merge
from retrace.analyze.metrics.measure import ExactBlock, measure
from retrace.analyze.outputs.plots.style import counted_words
from retrace.analyze.replay import engine
from retrace.analyze.replay.counting import Counting
from retrace.analyze.replay.spans import rows_within, spans_named
from retrace.analyze.units.selection import Selection
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
LENGTHS = (53, 31, 40, 47)
MARKS: list[dict[str, list[range]]] = [
    {"answer": [range(21, 24), range(30, 31), range(44, 53)], "evidence": [range(4, 9)]},
    {"evidence": [range(2, 3)]},
    {"answer": [range(0, 2), range(29, 38)]},
    {"answer": [range(40, 47)], "note": [range(3, 4)]},
]
PHASES = [[0] * 20 + [1] * 10 + [2] * (n - 30) for n in LENGTHS]
METHODS = {"calibration_sequences": "loki", "protocol": "block-oracle:block=8"}
"""What is asked for besides decides which method can be."""
INSIDE = {
    "answer": {
        53: {21, 22, 23, 30, *range(44, 53)},
        40: {0, 1, *range(29, 38)},
        47: {*range(40, 47)},
    },
    "continuation": {n: {*range(20, 30)} for n in LENGTHS},
    "generated": {n: {*range(30, n)} for n in LENGTHS},
}
"""Positions by name and by the length of the sequence."""


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Callable[..., Any]) -> Trace:
    """Two layers, one of them with a window, of marked sequences in three phases."""
    layers = [rules(heads=4, kv_heads=2), rules(heads=4, kv_heads=2, window=13)]
    phases = [np.array(phase, np.int8) for phase in PHASES]
    return make_trace(layers, LENGTHS, marks=MARKS, phases=phases)


def test_spans_of_marks_and_phases(trace: Trace) -> None:
    for name, by_length in INSIDE.items():
        for sequence, length in enumerate(LENGTHS):
            spans = spans_named(trace, name, sequence)
            assert {p for span in spans for p in span} == by_length.get(length, set())
            assert all(a.stop < b.start for a, b in itertools.pairwise(spans))
    assert spans_named(trace, "context", 1) == (range(20),)


@pytest.mark.parametrize("first", [0, 8, 9, 30, 99])
def test_rows_are_as_few_slices_as_hold_them(first: int) -> None:
    positions = torch.tensor([1, 3, 4, 8, 9, 10, 20, 30])
    spans = (range(0, 4), range(4, 9), range(9, 10), range(11, 20), range(30, 31))
    rows = rows_within(positions.tolist(), spans, first)
    held = [int(p) for part in rows for p in positions[part]]
    wanted = [p for p in positions.tolist() if p >= first and any(p in span for span in spans)]
    assert held == wanted
    assert all(a.stop < b.start for a, b in itertools.pairwise(rows))


def sinks_and_newest(query: Any, k: int) -> list[int]:
    """The first four positions, the query's own, and the newest others while there is budget."""
    sinks = [int(j) for j in query.visible if j < 4]
    newest = [int(j) for j in reversed(query.visible) if j >= 4]
    return [*sinks, *newest[: max(k - len(sinks), 1)]]


@pytest.mark.parametrize("where", INSIDE)
@pytest.mark.parametrize("layer", [0, 1])
def test_figures_are_those_of_the_definitions(
    trace: Trace, where: str, layer: int, expected: Any, assert_figures: Any
) -> None:
    results = analyze(trace, ["exact", "window"], [1, 3], min_context=9, where=where)
    for method, select in (
        ("exact", lambda query, k: query.top(k)),
        ("window", sinks_and_newest),
    ):
        for k in (1, 3):
            wanted = expected(
                trace,
                select,
                k,
                layer=layer,
                first=9,
                counts=lambda query: query.position in INSIDE[where].get(len(query.keys), ()),
                aux=lambda query: 16.0 * len(query.visible) * (method == "exact"),  # noqa: B023
                holds_keys=method == "exact",
            )
            assert_figures(results, method, k, wanted, layer=layer)


@pytest.fixture
def each_query(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, ...], float]:
    """Filled while a run goes on: recall, attended keys and error of every query that counts, by
    sequence, position, head, budget and metric, by plain operations."""
    found: dict[tuple[Any, ...], float] = {}
    tally = engine.tally

    def spy(exact: ExactBlock, selection: Selection, points: list[int], first: torch.Tensor) -> Any:
        measured, block = measure(exact, selection, points), exact.block
        for metric, values in (measured.at_all | measured.at_points).items():
            for at, k in enumerate(selection.ks[p] for p in points):
                row = points[at] if metric in measured.at_all else at
                for head, of_head in enumerate(values[row].tolist(), block.unit.group.heads.start):
                    for position, value in zip(block.positions.tolist(), of_head, strict=True):
                        place = block.unit.group.sequence, position, head, k, metric
                        assert place not in found
                        found[place] = value
        return tally(exact, selection, points, first)

    monkeypatch.setattr(engine, "tally", spy)
    return found


@pytest.mark.parametrize("protocol", ["all:16", "prefix:0.5", "decode:4:from=20"])
@pytest.mark.parametrize(
    "method", ["h2o", "snapkv:window=4", "tova", "quest:page=4", "loki", "hnsw"]
)
@pytest.mark.usefixtures("untried")
def test_methods_see_every_query_as_before(
    trace: Trace, each_query: dict[tuple[Any, ...], float], protocol: str, method: str
) -> None:
    """A run's figures over a mark are those of its queries in a run that counts all."""
    if method == "hnsw":
        pytest.importorskip("faiss", reason="hnsw needs faiss")
    options: dict[str, Any] = {"protocol": protocol, "min_context": 5, "layers": [0]}
    analyze(trace, method, [2, 5], **options, workers=1)
    told = pd.Series(each_query).rename_axis(["sequence", "position", "head", "topk", "metric"])
    each_query.clear()
    results = analyze(trace, method, [2, 5], **options, where="answer", workers=1)
    first = {
        n: int(n / 2) if protocol == "prefix:0.5" else 20 * ("from" in protocol) for n in LENGTHS
    }
    counted = [
        LENGTHS[sequence] in INSIDE["answer"]
        and position in INSIDE["answer"][LENGTHS[sequence]]
        and position >= max(5, first[LENGTHS[sequence]])
        for sequence, position, *_ in told.index
    ]
    wanted = told[counted].groupby(["metric", "topk", "head"])
    for metric in ("recall", "attention_fraction", "error_norm", "density", "bytes_ratio"):
        rows = results.metrics[results.metrics["metric"] == metric]
        rows = rows.sort_values(["topk", "head"])
        assert len(rows) == 8
        for name, figure in (("mean", wanted.mean()), ("std", wanted.std(ddof=0))):
            np.testing.assert_allclose(rows[name], figure[metric], atol=3e-6, err_msg=metric)
        assert (rows["count"].to_numpy() == wanted.count()[metric]).all()
    worst = results.tails[results.tails["metric"] == "error_norm"].sort_values(["topk", "head"])
    np.testing.assert_allclose(worst["worst"], wanted.max()["error_norm"], atol=3e-6)
    for row in worst.itertuples():
        assert row.worst_position in INSIDE["answer"][LENGTHS[row.worst_sequence]]


@pytest.mark.usefixtures("untried")
def test_it_is_the_same_bytes_for_any_number_of_workers(trace: Trace, tmp_path: Path) -> None:
    options: dict[str, Any] = {"where": "answer", "min_context": 3}
    one, four, merged = (tmp_path / name for name in ("one", "four", "merged"))
    methods = ["exact", "h2o", "quest:page=4"]
    analyze(trace, methods, [2, 5], **options, workers=1, out=one)
    analyze(trace, methods, [2, 5], **options, workers=4, out=four)
    for part in (1, 2):
        analyze(trace, methods, [2, 5], **options, part=(part, 2), out=merged)
    merge([merged])
    for file in one.glob("*.parquet"):
        assert file.read_bytes() == (four / file.name).read_bytes(), file.name
        assert file.read_bytes() == (merged / file.name).read_bytes(), file.name


@pytest.mark.usefixtures("untried")
def test_kept_exact_answers_are_of_all_queries(trace: Trace, tmp_path: Path) -> None:
    alone = analyze(trace, "quest", [2], where="answer", min_context=0, keep_exact=False)
    first = analyze(trace, "quest", [2], where="generated", min_context=0)
    assert not first.metrics.equals(alone.metrics)
    again = analyze(trace, "quest", [2], where="answer", min_context=0)
    pd.testing.assert_frame_equal(again.metrics, alone.metrics, check_exact=False, atol=1e-6)


def test_it_is_told_where_the_figures_stand(
    trace: Trace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = analyze(trace, "exact", [2], where="answer", out=tmp_path)
    assert "1 of 4 sequences have no query in answer and are left out: 1." in caplog.text
    assert results.run["where"] == "answer" and results.run["sequences"] == [0, 2, 3]
    assert set(results.metrics["min_context"]) == {"20 in answer"}
    words = "in answer, from position 20 on"
    assert words in results.queries_words()["exact", 2]
    assert words in (tmp_path / "table.md").read_text()
    assert words in counted_words(results)
    assert Counting.recorded(json.loads((tmp_path / "run.json").read_text())).where == "answer"
    assert Results.load(tmp_path).to_xarray().attrs["where"] == "answer"


def test_a_folder_holds_figures_of_one_place(trace: Trace, tmp_path: Path) -> None:
    analyze(trace, "exact", [2], where="generated", out=tmp_path)
    for other in ("continuation", None):
        with pytest.raises(RetraceError, match="holds results of another where: choose another"):
            analyze(trace, "window", [2], where=other, out=tmp_path)
    again = analyze(trace, "window", [2], where="generated", out=tmp_path)
    assert again.methods() == ["exact", "window"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "anwser"}, "has it; there are context, continuation, generated, answer, evide"),
        ({"evidence": "needle"}, "--evidence needle: no sequence of .* has it; there are context"),
        ({"where": "answer", "protocol": "prefill:8"}, "a span may hold part of one: leave it out"),
        ({"where": "note"}, "takes a position of at least 20, and note ends at 3. Choose a smal"),
        ({"where": "answer", "locality": True}, "--where answer has one of 23 and the next of 30"),
        ({"where": "note", "calibration_sequences": [3], "min_context": 0}, "holds no query there"),
    ],
)
def test_what_cannot_be_is_refused(trace: Trace, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RetraceError, match=message):
        analyze(trace, METHODS.get(min(options), "exact"), [2], **options)


def test_queries_that_the_trace_lacks_are_in_no_span(
    make_trace: MakeTrace, rules: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    queries = [[5, 22, 50], [30], [39], [4]]
    trace = make_trace(rules(), LENGTHS, queries=queries, marks=MARKS)
    results = analyze(trace, "exact", [1], where="answer", min_context=0)
    assert results.run["sequences"] == [0]
    assert set(results.metrics.loc[results.metrics["metric"] == "recall", "count"]) == {2}
    assert "3 of 4 sequences have no query in answer and are left out: 1, 2, 3." in caplog.text
    with pytest.raises(RetraceError, match=r"--where note: .* holds no query there of a sequence"):
        analyze(trace, "exact", [1], where="note", min_context=0)


def test_a_mark_of_a_phases_name_is_refused(
    make_trace: MakeTrace, rules: Callable[..., Any]
) -> None:
    trace = make_trace(rules(), [30], marks=[{"generated": [range(20, 25)]}])
    with pytest.raises(RetraceError, match=r"a mark of that name, which is a phase's too"):
        analyze(trace, "exact", [1], where="generated")


def test_an_estimate_counts_the_blocks_that_are_left(trace: Trace) -> None:
    whole = estimate(trace, "exact", [2], min_context=0, keep_exact=False)
    part = estimate(trace, "exact", [2], min_context=0, keep_exact=False, where="answer")
    assert part.tasks == whole.tasks * 3 // 4 and 0 < part.scores < whole.scores


def test_locality_of_one_span(trace: Trace) -> None:
    results = analyze(trace, "window", [3], where="generated", locality=True, min_context=0)
    alone = analyze(trace, "window", [3], min_context=30, locality=True)
    columns = ["method", "layer", "cache", "head", "topk", "metric", "at"]
    pd.testing.assert_frame_equal(
        results.locality.sort_values(columns), alone.locality.sort_values(columns)
    )


@pytest.mark.parametrize("changes", [{}, {"cached_bytes": 24}], ids=["own", "shared cache"])
@pytest.mark.usefixtures("untried")
def test_the_end_of_each_sequence_is_what_min_context_counts(
    make_trace: MakeTrace, rules: Callable[..., Any], changes: dict[str, Any]
) -> None:
    marks = [{"end": [range(30, n)]} for n in (53, 40)]
    trace = make_trace(rules(heads=4, kv_heads=2, **changes), (53, 40), marks=marks)
    methods = ["exact", "quest:page=4", "h2o"]
    inside = analyze(trace, methods, [2, 5], where="end", min_context=0)
    alone = analyze(trace, methods, [2, 5], min_context=30)
    for table in ("metrics", "curves", "sequences", "positions", "tails"):
        one, other = (getattr(of, table) for of in (inside, alone))
        if "min_context" in one:
            one, other = (of.drop(columns="min_context") for of in (one, other))
        pd.testing.assert_frame_equal(one, other, check_exact=False, rtol=1e-5, atol=1e-7)
