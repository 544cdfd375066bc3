"""Windows and sinks that are published for large budgets leave something to find in small ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retrace.analyze import Keep, ScoreMethod, analyze, method_names, parse_spec
from retrace.analyze.methods.snapkv import SnapKV
from retrace.traces import LayerRules, RetraceError, Trace

MakeTrace = Callable[..., Trace]
Rules = Callable[..., LayerRules]
WINDOWS = ("adakv", "pyramidkv", "snapkv")


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize(
    ("k", "window"), [(1, 0), (3, 0), (4, 1), (16, 4), (64, 16), (255, 63), (256, 64), (2048, 64)]
)
def test_a_window_takes_a_quarter(name: str, k: int, window: int) -> None:
    method = parse_spec(name).method
    assert isinstance(method, SnapKV)
    assert method.at(k).window == window
    assert (
        parse_spec(f"{name}:window=8").method.at(k)
        == parse_spec(f"{name}:window={min(8, window)}").method
    )


def test_a_window_cannot_take_all() -> None:
    with pytest.raises(
        RetraceError, match=r"window_share=1\.0: expected more than 0 and less than"
    ):
        parse_spec("snapkv:window_share=1.0")
    assert parse_spec("snapkv:window_share=0.5").parameters["window_share"] == 0.5


@pytest.mark.parametrize("name", sorted(set(method_names()) - {"window"}))
def test_something_is_left_to_find(name: str) -> None:
    """Of every budget, whatever a method keeps unless told otherwise."""
    kind = type(parse_spec(name).method)
    if kind.extra is not None and not kind.is_installed():
        pytest.skip(f"{kind.extra} is not installed")
    method = parse_spec(name).method
    if not isinstance(method, ScoreMethod):
        pytest.skip(f"{name} is no score method: what it keeps comes besides the budget")
    for k in [*range(2, 300), 1000, 7000, 100_000]:
        assert sum(method.at(k).keep.at(k)) < k, k


@pytest.mark.parametrize(
    ("name", "k", "sink", "recent"),
    [
        ("pqcache", 8, 2, 3),
        ("pqcache", 64, 16, 24),
        ("pqcache", 128, 32, 48),
        ("pqcache", 1032, 32, 500),
        ("clusterkv", 16, 4, 0),
        ("clusterkv", 1024, 16, 0),
        ("infllm", 6400, 128, 4096),
        ("saap", 4096, 1, 2048),
        ("pariskv", 310, 4, 256),
        ("expected-attention", 16, 4, 0),
        ("arkvale", 128, 32, 64),
        ("arkvale", 64, 16, 32),
    ],
)
def test_published_numbers_hold_for_large_budgets(
    name: str, k: int, sink: int, recent: int
) -> None:
    method = parse_spec(name).method
    assert isinstance(method, ScoreMethod)
    assert method.keep.at(k) == (sink, recent)


@pytest.mark.parametrize(
    "keep",
    [
        Keep(sink=32, sink_most=0.25),
        Keep(recent=64, recent_most=0.5),
        Keep(sink=8, recent_share=0.5, of_rest=True),
        Keep(sink=32, sink_most=0.25, recent_share=0.5, of_rest=True),
    ],
    ids=str,
)
def test_text_says_all(keep: Keep) -> None:
    assert Keep.parse(str(keep)) == keep


@pytest.mark.parametrize("text", ["sink:0.5r", "recent:0.5k<0.25k", "sink:4<2", "sink:4<"])
def test_mistakes_are_refused(text: str) -> None:
    with pytest.raises(RetraceError, match="keep="):
        Keep.parse(text)


@pytest.mark.parametrize(
    "spec", ["snapkv:kernel=1", "adakv:kernel=1", "pyramidkv:kernel=1", "pqcache"]
)
def test_small_budgets_find_what_large_ones_do(
    make_trace: MakeTrace, rules: Rules, tensors: Any, spec: str
) -> None:
    """One key that all queries attend, long before any window: each budget finds it, in the last
    layer too."""
    layer = rules(heads=2, kv_heads=1)
    rng = np.random.default_rng(0)
    query, key, value = tensors(layer, 200, rng)
    query[:], key[:] = 0.1 * query, 0.1 * key
    query[..., 0], key[:, 70, 0] = 4, 4
    given = {(i, 0): (query, key, value) for i in range(2)}
    trace = make_trace([layer, layer], [200], tensors=given, name="needle")
    rows = analyze(
        trace, [spec], [4, 16, 64], protocol="prefix:190", min_context=190, keep_exact=False
    ).metrics
    fractions = rows[rows.metric == "attention_fraction"]
    assert fractions["mean"].min() > 0.8


@pytest.mark.parametrize("pool", ["sum-softmax", "max-softmax", "layer-sum-softmax"])
def test_what_is_kept_has_no_part_in_a_softmax(
    make_trace: MakeTrace, rules: Rules, queries_of: Any, pool: str
) -> None:
    """The group's choice, by softmaxes over the keys that have to be found."""
    trace = make_trace(rules(heads=4, kv_heads=1), [80])
    k, sink, recent = 9, 2, 3
    spec = f"exact:pool={pool},keep=sink:{sink}+recent:{recent}"
    rows = analyze(trace, [spec], [k], min_context=30, keep_exact=False).metrics
    found = rows[rows.metric == "attention_fraction"].set_index("head")["mean"]
    masses: dict[int, list[float]] = {}
    apart = 0
    for group in queries_of(trace):
        position = group[0].position
        if position < 30:
            continue
        kept = [*range(sink), *range(position - recent + 1, position + 1)]
        orders = []
        for keys in (np.arange(sink, position - recent + 1), np.arange(position + 1)):
            weights = np.stack([np.exp(query.scores[keys]) for query in group])
            shares = weights / weights.sum(axis=1, keepdims=True)
            pooled = shares.max(axis=0) if pool == "max-softmax" else shares.sum(axis=0)
            best = [int(keys[i]) for i in np.argsort(-pooled, kind="stable")]
            orders.append([j for j in best if j not in kept][: k - len(kept)])
        ours, others = orders
        apart += ours != others
        for query in group:
            mass = query.probabilities[[*kept, *ours]].sum()
            masses.setdefault(query.head, []).append(float(mass))
    assert apart > 10  # or the test could not tell
    for head, each in masses.items():
        assert found[head] == pytest.approx(np.mean(each), abs=1e-4)


def test_a_press_whose_window_fills_the_budget_is_refused() -> None:
    method = parse_spec("kvpress:press=SnapKVPress,arguments=window_size=32").method
    assert isinstance(method, ScoreMethod)
    assert method.at(33) == method and not method.nested
    with pytest.raises(RetraceError, match="keeps the 32 keys of its window"):
        method.at(32)
    assert parse_spec("kvpress:press=KnormPress").method.at(1)
