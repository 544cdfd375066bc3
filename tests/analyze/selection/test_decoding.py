"""Evictions while a model decodes: what is dropped is gone, against a simulation in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from retrace.analyze import analyze
from retrace.analyze.units.protocol import Protocol
from retrace.traces import LayerRules, RetraceError, Trace

Array = npt.NDArray[np.float64]
MakeTrace = Callable[..., Trace]
LENGTH, FIRST, STEP = 61, 20, 7


class Cache:
    """One kv head's keys that are left, step by step, as a decoding model would hold them."""

    def __init__(self, trace: Trace, kv_head: int) -> None:
        layer = trace.layer(0)
        group = layer.rules.group
        self.scale = layer.rules.scale
        self.queries = layer.query(0).astype(np.float64)[kv_head * group : (kv_head + 1) * group]
        self.keys = layer.key(0).astype(np.float64)[kv_head]

    def attention(self, position: int, held: Sequence[int]) -> Array:
        """Probabilities (group, held) of the query at a position over the keys held so far."""
        ids = np.array(held)
        scores = self.scale * self.queries[:, position] @ self.keys[ids].T
        scores[:, ids > position] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)


def evictions(until: int) -> list[tuple[int, int]]:
    """Where the queries of each eviction begin, and where its past ends."""
    ends = [e for e in range(FIRST, LENGTH, STEP) if e <= until]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def best(held: Sequence[int], worth: Array, k: int) -> list[int]:
    return [held[i] for i in np.lexsort((np.array(held), -worth))[:k]]


def by_norm(caches: list[Cache], kv_head: int, until: int, k: int) -> list[int]:
    keys, left = caches[kv_head].keys, list[int]()
    for since, end in evictions(until):
        held = [*sorted(left), *range(since, end)]
        left = best(held, -np.linalg.norm(keys[held], axis=1), k)
    return left


def by_last_query(caches: list[Cache], kv_head: int, until: int, k: int) -> list[int]:
    left = list[int]()
    for since, end in evictions(until):
        held = [*sorted(left), *range(since, end)]
        worth = np.concatenate([cache.attention(end - 1, held) for cache in caches]).mean(axis=0)
        left = best(held, worth, k)
    return left


def by_all_attention(caches: list[Cache], kv_head: int, until: int, k: int) -> list[int]:
    """Half of the budget are the newest keys, the others those of most attention since they came:
    what a key received before an eviction stays with it."""
    cache, left = caches[kv_head], list[int]()
    received: dict[int, float] = {}
    for since, end in evictions(until):
        held = [*sorted(left), *range(since, end)]
        for position in range(since, end):
            for key, share in zip(held, cache.attention(position, held).mean(axis=0), strict=True):
                received[key] = received.get(key, 0.0) + share
        recent = held[::-1][: k // 2]
        others = [key for key in held if key not in recent]
        worth = np.array([received[key] for key in others])
        left = [*recent, *best(others, worth, k - len(recent))]
    return left


SIMULATIONS = {"knorm": by_norm, "tova": by_last_query, "h2o": by_all_attention}


@pytest.mark.parametrize("method", SIMULATIONS)
@pytest.mark.parametrize("k", [2, 6])
def test_figures(
    make_trace: MakeTrace, rules: Any, expected: Any, assert_figures: Any, method: str, k: int
) -> None:
    trace = make_trace(rules(heads=4, kv_heads=2), [LENGTH])
    protocol = f"decode:{STEP}:from={FIRST}"
    results = analyze(trace, [method], [k], protocol=protocol, min_context=0, keep_exact=False)
    caches = [Cache(trace, kv_head) for kv_head in range(2)]

    def select(query: Any, k: int) -> list[int]:
        end = evictions(query.position)[-1][1]
        left = SIMULATIONS[method](caches, query.head // 2, query.position, k)
        return [*range(query.position, end - 1, -1), *left]

    figures = expected(trace, select, k, first=FIRST)
    assert_figures(results, method, k, figures.drop("recall"))  # new keys do not count towards k


def test_one_eviction_is_that_of_a_prefix(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), [LENGTH])
    figures = [
        analyze(trace, ["snapkv"], [5], protocol=p, min_context=0, keep_exact=False).metrics
        for p in (f"prefix:{FIRST}", f"decode:{LENGTH}:from={FIRST}")
    ]
    ours, theirs = (f.drop(columns="protocol").reset_index(drop=True) for f in figures)
    assert ours.equals(theirs)


def test_the_prompt_is_kept_besides(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), [LENGTH])
    spec, k = "random-eviction:keep=prompt", 3
    protocol = f"decode:{STEP}:from={FIRST}"
    results = analyze(trace, [spec], [k], protocol=protocol, min_context=0, keep_exact=False)
    density = []
    for i in range(FIRST, LENGTH):
        ends = [end for _, end in evictions(i)]
        generated = min(k, ends[-1] - FIRST)  # of those that were judged
        density.append((FIRST + generated + i + 1 - ends[-1]) / (i + 1))
    found = results.metrics.query("metric == 'density'")["mean"]
    np.testing.assert_allclose(found, np.mean(density), rtol=1e-6)


def test_more_recent_keys_may_be_kept_than_there_are(make_trace: MakeTrace, rules: Any) -> None:
    """Sinks and the newest keys are what a window attends, however early evicting begins."""
    trace = make_trace(rules(), [LENGTH])
    spec = "random-eviction:keep=sink:2+recent:6"
    results = analyze(trace, [spec], [8], protocol="decode:1", min_context=20, keep_exact=False)
    window = analyze(trace, ["window:keep=sink:2"], [9], min_context=20, keep_exact=False)
    ours, theirs = (
        found.metrics.query(f"topk == {k}").pivot_table(
            index="head", columns="metric", values="mean"
        )
        for found, k in ((results, 8), (window, 9))
    )
    for metric in ("error_norm", "attention_fraction", "density"):
        assert ours[metric].to_numpy() == pytest.approx(theirs[metric].to_numpy(), abs=1e-6)


def test_the_distance_is_from_the_first_eviction() -> None:
    protocol = Protocol.parse("decode:8:from=20")
    assert [protocol.since(position, 100) for position in (5, 20, 27, 28, 60)] == [
        5,
        20,
        20,
        20,
        20,
    ]
    assert [protocol.evictions(position, 100) for position in (20, 27, 28, 60)] == [1, 1, 2, 6]
    assert [str(Protocol.parse(p)) for p in ("decode:8", "decode:8:from=0.5")] == [
        "decode:8",
        "decode:8:from=0.5",
    ]


@pytest.mark.parametrize(
    ("spec", "change", "line"),
    [
        ("knorm", {"window": 9}, "sees its last keys only"),
        ("adakv", {}, "leaves them different numbers of keys"),
        ("h2o:pool=none", {}, "keeps keys of its own for each query head"),
        ("knorm:output=mean-fill", {}, "not defined where keys are gone"),
        ("knorm:cache=fp8", {}, "cache=fp8 is not followed through evictions"),
        ("quest:keep=prompt", {}, "keeps the prompt, which there is only for methods that evict"),
    ],
)
def test_what_is_not_defined_is_refused(
    make_trace: MakeTrace, rules: Callable[..., LayerRules], spec: str, change: Any, line: str
) -> None:
    trace = make_trace(rules(heads=4, kv_heads=2, **change), [LENGTH])
    with pytest.raises(RetraceError, match=line):
        analyze(trace, [spec], [6], protocol="decode:8:from=20", min_context=0, keep_exact=False)


def test_a_prompt_is_kept_under_no_other_protocol(make_trace: MakeTrace, rules: Any) -> None:
    with pytest.raises(RetraceError, match="give --protocol decode:R:from=P"):
        analyze(make_trace(rules(), [LENGTH]), ["knorm:keep=prompt"], [4], keep_exact=False)
