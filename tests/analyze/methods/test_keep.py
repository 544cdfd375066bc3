"""Always-kept sinks and recent keys."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retrace.analyze import Keep, analyze
from retrace.traces import LayerRules, RetraceError, Trace

MakeTrace = Callable[..., Trace]


def kept(query: Any, sink: int, recent: int) -> list[int]:
    """The visible keys among the first `sink` and the last `recent`, the latter newest first."""
    first = [int(j) for j in query.visible if j < sink]
    last = [int(j) for j in query.visible[::-1] if j > query.position - recent and j >= sink]
    return first + last


def kept_and_best(sink: int, recent: Callable[[int], int]) -> Callable[[Any, int], list[int]]:
    """The kept keys, then the best others while there is budget."""

    def select(query: Any, k: int) -> list[int]:
        given = kept(query, sink, recent(k))
        others = [j for j in query.top(len(query.keys)) if j not in given]
        return given + others[: max(0, k - len(given))]

    return select


@pytest.mark.parametrize(
    ("keep", "sink", "recent"),
    [
        ("sink:2", 2, lambda k: 0),
        ("recent:3", 0, lambda k: 3),
        ("sink:1+recent:4", 1, lambda k: 4),
        ("sink:3+recent:0.5k", 3, lambda k: k // 2),
        ("recent:0.25k", 0, lambda k: k // 4),
        ("sink:40+recent:40", 40, lambda k: 40),
    ],
)
def test_figures(
    make_trace: MakeTrace,
    rules: Any,
    expected: Any,
    assert_figures: Any,
    keep: str,
    sink: int,
    recent: Callable[[int], int],
) -> None:
    trace = make_trace(rules(heads=4))
    spec = f"exact:keep={keep}"
    results = analyze(trace, [spec], [1, 3, 8], min_context=0, keep_exact=False)
    for k in (1, 3, 8):
        figures = expected(trace, kept_and_best(sink, recent), k, first=0)
        assert_figures(results, spec, k, figures.drop("bytes_ratio"))


def test_every_kind_of_layer(
    make_trace: MakeTrace, any_rules: LayerRules, expected: Any, assert_figures: Any
) -> None:
    trace = make_trace(any_rules)
    spec = "exact:keep=sink:2+recent:2"
    results = analyze(trace, [spec], [6], min_context=0, keep_exact=False)
    figures = expected(trace, kept_and_best(2, lambda k: 2), 6, first=0)
    assert_figures(results, spec, 6, figures.drop("bytes_ratio"))


@pytest.mark.parametrize(
    ("keep", "sink", "recent"), [("sink:2+recent:3", 2, 3), ("recent:5", 0, 5)]
)
def test_candidate_recall_leaves_out_what_is_kept(
    make_trace: MakeTrace, rules: Any, queries_of: Any, keep: str, sink: int, recent: int
) -> None:
    trace = make_trace(rules(heads=4))
    spec = f"sparq:keep={keep},rank=2,pool=none,output=renorm"
    rows = analyze(trace, [spec], [6], min_context=0, keep_exact=False).metrics
    rows = rows[rows.metric == "candidate_recall"].set_index("head")
    wanted: dict[int, list[float]] = {h: [] for h in range(4)}
    for group in queries_of(trace):
        for query in group:
            given = set(kept(query, sink, recent))
            best = set(query.top(6)) - given
            magnitude = np.abs(query.group).sum(axis=0)
            channels = np.argsort(-magnitude, kind="stable")[:2]
            estimate = query.keys[:, channels] @ query.query[channels]
            found = [j for j in query.best(estimate, len(query.keys)) if j not in given]
            found = found[: max(0, 6 - len(given))]
            if best:
                wanted[query.head].append(len(best & set(found)) / len(best))
    for head, figures in wanted.items():
        assert rows.loc[head, "count"] == len(figures)
        assert rows.loc[head, "mean"] == pytest.approx(np.mean(figures), abs=0.02)


def test_candidate_recall_is_there_only_if_something_is_kept(
    make_trace: MakeTrace, rules: Any
) -> None:
    trace = make_trace(rules())
    rows = analyze(trace, ["exact", "quest", "window"], [2], keep_exact=False).metrics
    assert set(rows[rows.metric == "candidate_recall"]["method"]) == {"window"}


def test_kept_keys_inside_pages_are_not_counted_twice(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(heads=4))
    spec = "quest:keep=sink:3+recent:6,page=4"
    rows = analyze(trace, [spec], [70], min_context=0, keep_exact=False).metrics
    density = rows[rows.metric == "density"]
    np.testing.assert_allclose(density["mean"], 1)
    np.testing.assert_allclose(rows[rows.metric == "attention_fraction"]["mean"], 1, atol=1e-5)


def test_pages_of_kept_keys_take_no_page_of_the_budget(make_trace: MakeTrace, rules: Any) -> None:
    """Four pages of four are attended: those of the sinks and of the recent keys, and two more."""
    trace = make_trace(rules(heads=4), [64])
    spec = "exact:keep=sink:4+recent:4"
    quest = "quest:page=4,least_pages=1,keep=sink:4+recent:4"
    rows = analyze(trace, [spec, quest], [16], min_context=63, keep_exact=False).metrics
    density = rows[rows.metric == "density"].set_index(["method", "head"])["mean"]
    np.testing.assert_allclose(density, 16 / 64)


@pytest.mark.parametrize(
    "text",
    ["none", "sink:4", "recent:64", "sink:4+recent:64", "recent:0.25k", "sink:1+recent:0.125k"],
)
def test_text_round_trip(text: str) -> None:
    assert str(Keep.parse(text)) == text


@pytest.mark.parametrize(
    "keep",
    [Keep(recent=3, recent_share=0.25), Keep(recent_share=0.1234567), Keep(sink=2, recent=9)],
    ids=repr,
)
def test_text_says_all(keep: Keep) -> None:
    assert Keep.parse(str(keep)) == keep


@pytest.mark.parametrize("share", [0.1, 0.29, 0.07, 0.57, 0.58])
def test_share_of_a_hundred(share: float) -> None:
    assert Keep(recent_share=share).at(100) == (0, round(100 * share))


@pytest.mark.parametrize("text", ["sinks:4", "sink", "sink:0.5k", "recent:1.5", "sink:4,recent:2"])
def test_mistakes_are_refused(text: str) -> None:
    with pytest.raises(RetraceError, match="keep="):
        Keep.parse(text)
