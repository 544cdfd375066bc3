"""Dropped keys that are merged into kept ones, against a cache in float64, step by step."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from retrace.analyze import analyze
from retrace.analyze.methods.options.merge import MERGED
from retrace.analyze.methods.toolkit.random_numbers import uniform
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules, RetraceError, Trace

Array = npt.NDArray[np.float64]
MakeTrace = Callable[..., Trace]
LENGTH, FIRST, STEP = 61, 28, 7
K = 6
PROTOCOL = f"decode:{STEP}:from={FIRST}"


class Cache:
    """What one kv head holds as a model decodes: positions, keys and values, in order."""

    def __init__(self, trace: Trace, kv_head: int, merge: str, evictor: str, k: int) -> None:
        self.k = k
        layer = trace.layer(0)
        self.rules, self.kv_head = layer.rules, kv_head
        heads = slice(kv_head * self.rules.group, (kv_head + 1) * self.rules.group)
        self.queries = layer.query(0).astype(np.float64)[heads]
        self.keys = layer.key(0).astype(np.float64)[kv_head]
        self.values = layer.value(0).astype(np.float64)[kv_head]
        self.merge, self.evictor = merge, evictor
        self.held: dict[int, tuple[Array, Array]] = {}
        self.received: dict[int, Array] = {}
        self.threshold: float | None = None
        self.merged = 0

    def attention(self, position: int, query: Array) -> tuple[list[int], Array]:
        """Probabilities of a query over what is held up to its position."""
        ids = [i for i in sorted(self.held) if i <= position]
        scores = self.rules.scale * np.array([query @ self.held[i][0] for i in ids])
        weights = np.exp(scores - scores.max())
        return ids, weights / weights.sum()

    def output(self, position: int, head: int) -> Array:
        ids, weights = self.attention(position, self.queries[head, position])
        return weights @ np.array([self.held[i][1] for i in ids])

    def take(self, since: int, end: int) -> None:
        """Hold the positions since the last eviction, and note what their queries attended to."""
        for i in range(since, end):
            self.held[i] = self.keys[i], self.values[i]
        for i in range(since, end):
            for query in self.queries[:, i]:
                for j, share in zip(*self.attention(i, query), strict=True):
                    self.received[j] = self.received.get(j, np.zeros(())) + share

    def evict(self) -> None:
        held = sorted(self.held)
        if self.evictor == "knorm":
            kept = sorted(held, key=lambda i: (np.linalg.norm(self.held[i][0]), i))[: self.k]
        else:  # half of the budget are the newest keys
            recent, others = held[-(self.k // 2) :], held[: -(self.k // 2)]
            kept = (
                recent
                + sorted(others, key=lambda i: (-self.received[i], i))[: self.k - self.k // 2]
            )
        kept = sorted(kept)
        dropped = [i for i in held if i not in kept]
        before = dict(self.held)
        if self.merge == "d2o" and dropped:
            self.fold(kept, dropped, before)
        if self.merge == "cam":
            self.share_out(kept, dropped, before)
        for i in dropped:
            del self.held[i], self.received[i]

    def fold(self, kept: list[int], dropped: list[int], before: Any) -> None:
        def cosine(i: int, j: int) -> float:
            a, b = before[i][0], before[j][0]
            return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

        nearest = {i: max(kept, key=lambda j, i=i: cosine(i, j)) for i in dropped}
        alike = {i: cosine(i, nearest[i]) for i in dropped}
        mean = float(np.mean(list(alike.values())))
        self.threshold = mean if self.threshold is None else (self.threshold + mean) / 2
        for j in kept:
            own = [i for i in dropped if nearest[i] == j and alike[i] >= self.threshold - 1e-9]
            self.merged += len(own)
            self.held[j] = tuple(  # type: ignore[assignment]
                (before[j][part] + sum(alike[i] * before[i][part] for i in own)) / (1 + len(own))
                for part in (0, 1)
            )

    def share_out(self, kept: list[int], dropped: list[int], before: Any) -> None:
        group = HeadGroup(0, 0, self.kv_head, self.rules)
        for i in dropped:
            after = [j for j in kept if j > i][:MERGED]
            if not after:
                continue
            chance = self.received[i] / np.mean([self.received[j] for j in after])
            if float(uniform(0, group, torch.tensor([i]), 1, heads=1)) < chance:
                self.merged += 1
                for j in after:
                    key, value = self.held[j]
                    self.held[j] = key, value + before[i][1] / len(after)


def simulated(trace: Trace, merge: str, evictor: str, k: int) -> tuple[dict[Any, Any], int]:
    """By head and position: what is attended, and the output over what the cache holds of it."""
    found, merged = {}, 0
    group = trace.layer(0).rules.group
    for kv_head in range(trace.layer(0).rules.kv_heads):
        cache, since = Cache(trace, kv_head, merge, evictor, k), 0
        for end in range(FIRST, LENGTH, STEP):
            cache.take(since, end)
            cache.evict()
            since, left = end, sorted(cache.held)
            for i in range(end, min(end + STEP, LENGTH)):
                cache.held[i] = cache.keys[i], cache.values[i]
                ids = [*range(i, end - 1, -1), *left]
                for head in range(group):
                    found[kv_head * group + head, i] = ids, cache.output(i, head)
            cache.held = {i: cache.held[i] for i in left}
        merged += cache.merged
    return found, merged


@pytest.mark.parametrize("evictor", ["knorm", "h2o"])
@pytest.mark.parametrize(("merge", "k"), [("d2o", 6), ("cam", 6), ("cam", MERGED + 4)])
def test_figures(
    make_trace: MakeTrace,
    rules: Callable[..., LayerRules],
    expected: Any,
    assert_figures: Any,
    merge: str,
    k: int,
    evictor: str,
) -> None:
    trace = make_trace(rules(heads=4, value_dim=5), [LENGTH])
    found, merged = simulated(trace, merge, evictor, k)
    assert merged > 5
    spec = f"{evictor}:merge={merge}"
    results = analyze(trace, [spec, evictor], [k], protocol=PROTOCOL, min_context=0)

    def select(query: Any, k: int) -> list[int]:
        return list(found[query.head, query.position][0])

    def output(query: Any, ids: Sequence[int]) -> Array:
        own: Array = found[query.head, query.position][1]
        return own

    figures = expected(trace, select, k, first=FIRST, output=output).drop("recall")
    assert_figures(results, spec, k, figures, atol=1e-4)
    rows = results.metrics.query("metric == 'error_norm'")
    table = rows.pivot_table(index="head", columns="method", values="mean")
    assert (table[spec] != table[evictor]).all()


def test_what_drops_nothing_merges_nothing(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), [LENGTH])
    specs = ["h2o", "h2o:merge=d2o", "h2o:merge=cam"]
    rows = analyze(trace, specs, [LENGTH], protocol=PROTOCOL, min_context=0).metrics
    table = rows.pivot_table(index=["metric", "head"], columns="method", values="mean")
    for merged in specs[1:]:
        assert table[merged].to_numpy() == pytest.approx(table["h2o"].to_numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("spec", "protocol", "words"),
    [
        ("h2o:merge=cam", "all", "merges what it drops .* give --protocol decode:R:from=P"),
        ("snapkv:merge=d2o", "prefix:20", "merges what it drops"),
        ("h2o:merge=most", PROTOCOL, "expected one of none, d2o, cam"),
    ],
)
def test_what_is_not_defined_is_refused(
    make_trace: MakeTrace, rules: Any, spec: str, protocol: str, words: str
) -> None:
    with pytest.raises(RetraceError, match=words):
        analyze(make_trace(rules(), [LENGTH]), [spec], [K], protocol=protocol, keep_exact=False)


def test_heads_that_share_one_cache_are_refused(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(heads=4, kv_heads=4, cached_bytes=24), [LENGTH], name="shared")
    with pytest.raises(RetraceError, match="share one cache"):
        analyze(trace, ["knorm:merge=d2o"], [K], protocol=PROTOCOL, keep_exact=False)
