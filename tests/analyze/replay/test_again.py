"""A results folder grows: what is there is not computed again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from retrace.analyze import Results, analyze
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
KEYS = ["method", "layer", "head", "topk", "metric"]


def sorted_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in an order of their own."""
    return frame.sort_values(KEYS).reset_index(drop=True)


def history(folder: Path) -> list[dict[str, Any]]:
    """What each run of a results folder did."""
    run = json.loads((folder / "run.json").read_text())
    return [entry["methods"] for entry in run["history"]]


def test_methods_and_budgets_are_added(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    trace = make_trace([rules(), rules(window=9)], name="own")
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    analyze(trace, ["exact", "quest"], [2], out=grown, min_context=10)
    analyze(trace, ["exact", "loki:basis=own"], [2], out=grown, min_context=10)
    results = analyze(
        trace, ["exact", "quest", "loki:basis=own"], [2, 4], out=grown, min_context=10
    )
    once = analyze(trace, ["exact", "quest", "loki:basis=own"], [2, 4], out=whole, min_context=10)
    assert history(grown) == [
        {"exact": [2], "quest": [2]},
        {"loki:basis=own": [2]},
        {"exact": [4], "quest": [4], "loki:basis=own": [4]},
    ]
    for ours, theirs in ((results.metrics, once.metrics), (results.curves, once.curves)):
        pd.testing.assert_frame_equal(
            sorted_rows(ours), sorted_rows(theirs), check_exact=False, atol=1e-6, rtol=1e-5
        )


def test_nothing_new_touches_nothing(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    trace = make_trace(rules(), name="own")
    first = analyze(trace, ["exact", "random"], [2, 3], out=tmp_path / "r")
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "r").iterdir()}
    again = analyze(trace, ["random", "exact"], [3], out=tmp_path / "r")
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "r").iterdir()}
    assert before == after
    pd.testing.assert_frame_equal(first.metrics, again.metrics)


def test_saved_results_read_back(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    trace = make_trace(rules())
    results = analyze(trace, ["exact", "window"], [2], out=tmp_path / "r", keep_exact=False)
    read = Results.load(tmp_path / "r")
    pd.testing.assert_frame_equal(read.metrics, results.metrics)
    pd.testing.assert_frame_equal(read.curves, results.curves)
    assert read.run == json.loads(json.dumps(results.run))


def test_table_is_over_heads(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace([rules(heads=4), rules(heads=4)])
    results = analyze(trace, ["random"], [2], keep_exact=False)
    table = results.table("random", 2).set_index("Layer")
    assert list(table.columns) == [
        "Method",
        "Top-k",
        "Mean Recall",
        "Std Recall",
        "Mean Error Norm",
        "Std Error Norm",
    ]
    for metric, title in (("recall", "Recall"), ("error_norm", "Error Norm")):
        rows = results.metrics[results.metrics.metric == metric]
        for module, heads in rows.groupby("module")["mean"]:
            assert table.loc[module, f"Mean {title}"] == pytest.approx(heads.to_numpy().mean())
            assert table.loc[module, f"Std {title}"] == pytest.approx(heads.to_numpy().std())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"protocol": "prefix:20"}, "protocol"),
        ({"min_context": 11}, "min_context"),
        ({"layers": [0]}, "layers"),
    ],
    ids=str,
)
def test_other_settings_are_refused(
    make_trace: MakeTrace, rules: Any, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    trace = make_trace([rules(), rules()])
    analyze(trace, topk=[2], out=tmp_path / "r", keep_exact=False)
    with pytest.raises(RetraceError, match=rf"{named}.*--overwrite"):
        analyze(trace, topk=[2], out=tmp_path / "r", keep_exact=False, **changes)


def test_results_of_another_trace_are_refused(
    make_trace: MakeTrace, rules: Any, tmp_path: Path
) -> None:
    analyze(make_trace(rules(), seed=1), topk=[2], out=tmp_path / "r", keep_exact=False)
    other = make_trace(rules(), seed=2)
    with pytest.raises(RetraceError, match="another trace"):
        analyze(other, topk=[2], out=tmp_path / "r", keep_exact=False)
    results = analyze(other, topk=[2], out=tmp_path / "r", keep_exact=False, overwrite=True)
    assert len(results.run["history"]) == 1


def test_a_folder_of_other_things_is_refused(
    make_trace: MakeTrace, rules: Any, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("\\\\begin{document}")
    with pytest.raises(RetraceError):
        analyze(make_trace(rules()), topk=[2], out=tmp_path / "notes", keep_exact=False)
    assert (tmp_path / "notes" / "thesis.tex").exists()


def test_overwriting_leaves_other_things(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    trace = make_trace(rules())
    analyze(trace, topk=[2], out=tmp_path / "r", keep_exact=False)
    (tmp_path / "r" / "notes.txt").write_text("mine")
    results = analyze(trace, ["window"], [3], out=tmp_path / "r", keep_exact=False, overwrite=True)
    assert (tmp_path / "r" / "notes.txt").read_text() == "mine"
    assert results.methods() == ["window"]
    assert Results.load(tmp_path / "r").methods() == ["window"]
