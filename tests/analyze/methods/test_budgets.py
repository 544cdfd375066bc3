"""Budget rules against their definitions in float64."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retrace.analyze import Budget, analyze
from retrace.traces import LayerRules, RetraceError, Trace

MakeTrace = Callable[..., Trace]
Select = Callable[[Any, int], list[int]]


def fewest(query: Any, listed: list[int], scores: Any, kept: int, share: float) -> list[int]:
    """The shortest part of a list, the kept keys at least, with this share of its mass."""
    weights = np.exp(scores[listed] - scores[listed].max())
    for count in range(max(1, kept), len(listed) + 1):
        if weights[:count].sum() >= share * weights.sum() * (1 - 1e-12):
            return listed[:count]
    return listed


def top_p(share: float, sink: int = 0) -> Select:
    def select(query: Any, k: int) -> list[int]:
        kept = [int(j) for j in query.visible if j < sink]
        others = [j for j in query.top(len(query.keys)) if j not in kept]
        listed = kept + others[: max(0, k - len(kept))]
        return fewest(query, listed, query.scores, len(kept), share)

    return select


def fraction(share: float) -> Select:
    return lambda query, k: query.top(min(k, math.ceil(round(share * len(query.visible), 6))))


def threshold(beta: float) -> Select:
    def select(query: Any, k: int) -> list[int]:
        scores = query.scores
        # As float32 has them, in which the rule is applied.
        least = np.float32(scores.max()) - np.float32(beta)
        return [j for j in query.top(k) if np.float32(scores[j]) >= least]

    return select


@pytest.mark.parametrize(
    ("spec", "select"),
    [
        ("budget=top-p:0.9", top_p(0.9)),
        ("budget=top-p:0.5", top_p(0.5)),
        ("keep=sink:3,budget=top-p:0.8", top_p(0.8, sink=3)),
        ("budget=fraction:0.1", fraction(0.1)),
        ("budget=fraction:0.29", fraction(0.29)),
        ("budget=threshold:1.3", threshold(1.3)),
        ("budget=threshold:0", threshold(0.0)),
    ],
)
@pytest.mark.parametrize("k", [1, 7, 60])
def test_figures(
    make_trace: MakeTrace,
    rules: Any,
    expected: Any,
    assert_figures: Any,
    spec: str,
    select: Select,
    k: int,
) -> None:
    trace = make_trace(rules(heads=4))
    results = analyze(trace, [f"exact:{spec}"], [k], min_context=0, keep_exact=False)
    figures = expected(trace, select, k, first=0).drop("bytes_ratio")
    assert_figures(results, results.methods()[0], k, figures)


def test_every_kind_of_layer(
    make_trace: MakeTrace, expected: Any, assert_figures: Any, any_rules: LayerRules
) -> None:
    trace = make_trace(any_rules)
    spec = "exact:budget=top-p:0.7"
    results = analyze(trace, [spec], [9], min_context=0, keep_exact=False)
    figures = expected(trace, top_p(0.7), 9, first=0).drop("bytes_ratio")
    assert_figures(results, spec, 9, figures)


@pytest.mark.parametrize("share", [0.3, 0.8, 0.95])
def test_lost_mass_is_bounded(make_trace: MakeTrace, rules: Any, share: float) -> None:
    """With exact scores and all keys for candidates, at most 1 - P of the mass is lost."""
    trace = make_trace(rules(heads=4))
    rows = analyze(
        trace, [f"exact:budget=top-p:{share}"], [53], min_context=0, keep_exact=False
    ).metrics
    held = rows[rows.metric == "attention_fraction"]
    assert (held["mean"] >= share - 1e-6).all()
    assert (rows[rows.metric == "density"]["mean"] < 0.9).all()


def test_pages_stay_whole(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any
) -> None:
    """Each key of a page weighs what the page's bound says; a page that is begun is read whole."""

    def select(query: Any, k: int) -> list[int]:
        bound = {}
        for p in sorted({int(j) // 4 for j in query.visible}):
            keys = query.keys[4 * p : min(4 * p + 4, query.position + 1)]
            low, high = keys.min(axis=0), keys.max(axis=0)
            bound[p] = query.rules.scale * np.maximum(query.query * low, query.query * high).sum()
        pages = sorted(bound, key=lambda p: (-bound[p], p))[: k // 4]
        members = {p: [int(j) for j in query.visible if j // 4 == p] for p in pages}
        mass = {p: len(members[p]) * np.exp(bound[p] - bound[pages[0]]) for p in pages}
        chosen: list[int] = []
        reached = 0.0
        for p in pages:
            if reached >= 0.8 * sum(mass.values()):
                break
            chosen += members[p]
            reached += mass[p]
        return chosen

    trace = make_trace(rules(heads=4))
    spec = "quest:budget=top-p:0.8,page=4,least_pages=1"
    results = analyze(trace, [spec], [16], min_context=0, keep_exact=False)
    figures = expected(trace, select, 16, first=0).drop("bytes_ratio")
    assert_figures(results, results.methods()[0], 16, figures)


def test_heads_prune_a_shared_list_by_themselves(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any
) -> None:
    def select(query: Any, k: int) -> list[int]:
        together = sum(query.scores_of(q) for q in query.group)
        return fewest(query, query.best(together, k), query.scores, 0, 0.8)

    trace = make_trace(rules(heads=4))
    spec = "exact:pool=sum,budget=top-p:0.8"
    results = analyze(trace, [spec], [8], min_context=0, keep_exact=False)
    figures = expected(trace, select, 8, first=0).drop("bytes_ratio")
    assert_figures(results, spec, 8, figures)


@pytest.mark.parametrize("rule", ["top-p:0.8", "threshold:1", "fraction:0.2"])
@pytest.mark.parametrize("spec", ["exact:pool=sum,", "quest:page=4,", "exact:keep=sink:2,"])
def test_other_budgets_of_a_run_change_nothing(
    make_trace: MakeTrace, rules: Any, spec: str, rule: str
) -> None:
    trace = make_trace(rules(heads=4))
    spec = f"{spec}budget={rule}"
    together = analyze(trace, [spec], [4, 9, 20], min_context=0, keep_exact=False).metrics
    alone = analyze(trace, [spec], [9], min_context=0, keep_exact=False).metrics
    together = together[together.topk == 9].reset_index(drop=True)
    assert together["mean"].to_numpy() == pytest.approx(alone["mean"].to_numpy(), nan_ok=True)


@pytest.mark.parametrize("text", ["k", "fraction:0.25", "top-p:0.95", "threshold:2.5"])
def test_text_round_trip(text: str) -> None:
    assert str(Budget.parse(text)) == text


@pytest.mark.parametrize("text", ["", "top-p", "top-p:0", "top-p:1.5", "fraction:2", "k:3", "p:1"])
def test_mistakes(text: str) -> None:
    with pytest.raises(RetraceError, match="budget="):
        Budget.parse(text)
