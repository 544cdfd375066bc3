"""Which queries count: the same for all budgets of a folder, unless each is to have its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from retrace.analyze import Results, analyze, estimate, merge
from retrace.analyze.replay.counting import Counting
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
Settings = dict[str, Any]


def counts(rows: pd.DataFrame) -> dict[int, tuple[int, ...]]:
    """How many queries each budget has, of all methods, layers and heads."""
    rows = rows[rows["metric"] != "candidate_recall"]
    return {int(k): tuple(sorted(set(of_k))) for k, of_k in rows.groupby("topk")["count"]}


def own_count(k: int) -> tuple[int]:
    """How many there are of sequences of 53 and 24 positions by the rule for k alone."""
    return (max(0, 53 - 10 * k) + max(0, 24 - 10 * k),)


@pytest.mark.parametrize(
    ("topk", "settings", "counted"),
    [
        ([1, 2, 5], {}, dict.fromkeys([1, 2, 5], (53 - 50,))),
        ([2, 1], {}, dict.fromkeys([1, 2], ((53 - 20) + (24 - 20),))),
        ([1, 2], {"protocol": "prefix:40"}, dict.fromkeys([1, 2], (53 - 40,))),
        ([1, 5], {"min_context": 30}, dict.fromkeys([1, 5], (53 - 30,))),
        ([1, 2, 5], {"min_context": "each"}, {1: (43 + 14,), 2: (33 + 4,), 5: (3,)}),
    ],
    ids=str,
)
def test_what_counts(
    make_trace: MakeTrace, rules: Any, topk: list[int], settings: Settings, counted: Any
) -> None:
    """Every budget and every point of the curves, of methods of every kind."""
    trace = make_trace([rules(), rules(window=9)])
    methods = ["exact", "quest:page=4", "sparq:keep=recent:2", "h2o"]
    if settings.get("protocol") is None:
        methods.remove("h2o")  # nothing is evicted there yet
    results = analyze(trace, methods, topk, keep_exact=False, **settings)
    assert counts(results.metrics) == counted
    own = settings.get("min_context") == "each"
    for k, found in counts(results.curves).items():
        assert found == (own_count(k) if own else counted[topk[0]])
    words = "10k" if own else str(settings.get("min_context", 10 * max(topk)))
    assert set(results.metrics["min_context"]) == {words}


def test_budgets_that_no_sequence_is_long_enough_for(
    make_trace: MakeTrace, rules: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """They go first; the largest that is left says what counts."""
    results = analyze(make_trace(rules()), topk=[1, 4, 6, 70], keep_exact=False)
    assert counts(results.metrics) == dict.fromkeys([1, 4], (53 - 40,))
    assert "No query counts for top-k 6, 70" in caplog.text


@pytest.mark.parametrize("first", [[4], [1]], ids=str)
def test_a_folder_keeps_the_queries_it_began_with(
    make_trace: MakeTrace,
    rules: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    first: list[int],
) -> None:
    trace, out = make_trace(rules(), name="own"), tmp_path / "r"
    begun = counts(analyze(trace, ["exact"], first, out=out).metrics)[first[0]]
    assert not caplog.text
    results = analyze(trace, ["exact", "window"], [1, 2, 4, 5], out=out)
    assert counts(results.metrics) == dict.fromkeys([1, 2, 4, 5], begun)
    assert set(counts(results.curves).values()) == {begun}
    assert f"from position {10 * first[0]} on" in caplog.text
    assert "from position 50 on" in caplog.text and "--out" in caplog.text
    caplog.clear()
    analyze(trace, ["quest"], first, out=out)  # would have the same
    assert not caplog.text
    caplog.clear()
    estimate(trace, ["loki:basis=own"], [5], out=out)
    assert "began" in caplog.text


def test_other_queries_by_name_are_refused(
    make_trace: MakeTrace, rules: Any, tmp_path: Path
) -> None:
    trace, out = make_trace(rules(), name="own"), tmp_path / "r"
    analyze(trace, ["exact"], [2], out=out)
    for least in (11, "each"):
        with pytest.raises(RetraceError, match=r"min_context.*--overwrite"):
            analyze(trace, ["exact"], [2], out=out, min_context=least)
    analyze(trace, ["exact"], [3], out=out, min_context=20)  # is what it has
    anew = analyze(trace, ["exact"], [3], out=out, overwrite=True)
    assert counts(anew.metrics) == {3: (53 - 30,)}


@pytest.mark.parametrize("least", ["each", 7], ids=str)
def test_a_folder_goes_on_by_its_own_rule(
    make_trace: MakeTrace,
    rules: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    least: int | str,
) -> None:
    """Each budget's own, as all folders were once, and a position that was asked for."""
    trace, out = make_trace(rules(), name="own"), tmp_path / "r"
    analyze(trace, ["exact"], [1, 2], out=out, min_context=least)
    recorded = json.loads((out / "run.json").read_text())["min_context"]
    assert recorded == (None if least == "each" else 7)
    results = analyze(trace, ["exact"], [1, 2, 3], out=out)
    own = {k: own_count(k) for k in (1, 2, 3)}
    alike = dict.fromkeys([1, 2, 3], ((53 - 7) + (24 - 7),))
    assert counts(results.metrics) == (own if least == "each" else alike)
    assert "began" in caplog.text
    assert Results.load(out).run["min_context"] == recorded


def test_parts_keep_what_the_first_began_with(
    make_trace: MakeTrace, rules: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace, out = make_trace(rules(), name="own"), tmp_path / "r"
    for budget in ([2], [1, 4]):
        for part in (1, 2):
            analyze(trace, ["exact"], budget, out=out, part=(part, 2), keep_exact=False)
    assert "began" in caplog.text
    assert counts(merge([out]).metrics) == dict.fromkeys([1, 2, 4], (33 + 4,))


def test_parts_over_other_queries_do_not_merge(
    make_trace: MakeTrace, rules: Any, tmp_path: Path
) -> None:
    trace, one, other = make_trace(rules(), name="own"), tmp_path / "a", tmp_path / "b"
    for out, budget in ((one, [2]), (other, [4])):
        analyze(trace, ["exact"], budget, out=out, part=(1, 1), keep_exact=False)
        for part in (1, 2):
            analyze(trace, ["exact"], budget, out=out, part=(part, 2), keep_exact=False)
    with pytest.raises(RetraceError, match="another min_context"):
        merge([one, other])


def test_kept_answers_do_not_depend_on_what_counts(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), name="own")
    kept = analyze(trace, ["exact"], [1, 5], keep_exact=True)
    again = analyze(trace, ["exact"], [1], keep_exact=True)
    fresh = analyze(trace, ["exact"], [1], keep_exact=False)
    pd.testing.assert_frame_equal(again.metrics, fresh.metrics)
    assert counts(kept.metrics)[1] == (3,)


@pytest.mark.parametrize("least", [-1, "soon", "10k"])
def test_mistakes(make_trace: MakeTrace, rules: Any, least: Any) -> None:
    with pytest.raises(RetraceError, match="min_context"):
        analyze(make_trace(rules()), topk=[1], min_context=least)


@pytest.mark.parametrize("least", ["soon", 2.5, True, -3, [1]], ids=str)
def test_what_no_run_wrote_is_refused(least: Any) -> None:
    with pytest.raises(RetraceError, match="min_context"):
        Counting.recorded({"protocol": "all", "min_context": least})


def test_queries_stand_in_every_table(make_trace: MakeTrace, rules: Any) -> None:
    results = analyze(make_trace(rules(), [1200, 40]), topk=[1, 2], keep_exact=False)
    assert list(results.summary()["Queries"]) == ["1,200"] * 2
    text = results.markdown()
    assert text.count("Over 1,200 queries of each head, from position 20 on, which attend ") == 2
    assert (results.queries() == 1200).all(axis=None)


def test_positions() -> None:
    assert Counting.asked("all", None) == Counting.asked("all", "each")
    assert Counting.asked("all", 20).for_all(7).first(3, 100) == 70
    assert Counting.asked("prefix:0.5", 20).first(3, 100) == 50


def test_other_queries_are_not_compared(make_trace: MakeTrace, rules: Any) -> None:
    results = analyze(make_trace(rules()), ["exact", "window"], [2], keep_exact=False)
    assert len(results.difference("exact", "window"))
    results.sequences.loc[results.sequences["method"] == "window", "count"] -= 1
    with pytest.raises(RetraceError, match=r"same queries.* 33 and 32"):
        results.difference("exact", "window")
