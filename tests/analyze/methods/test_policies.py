"""Policies that let some kv heads or layers stream, against definitions in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from retrace.analyze import analyze, parse_spec
from retrace.analyze.replay.calibration import calibration
from retrace.traces import LayerRules, RetraceError, Rotation, Trace

Array = npt.NDArray[np.float64]
MakeTrace = Callable[..., Trace]
FREQUENCIES = np.array([1.0, 0.3])
POSITIONS, SINK, RECENT = 20, 2, 5
DUO = f"duo-attention:positions={POSITIONS},sink={SINK},recent={RECENT}"
SIM = f"simlayerkv:sink={SINK},recent={RECENT}"


def numbers(vectors: Array) -> npt.NDArray[np.complex128]:
    """The four channels that turn, as two complex numbers."""
    found: npt.NDArray[np.complex128] = vectors[..., :2] + 1j * vectors[..., 2:4]
    return found


def score(query: Array, key: Array, scale: float) -> float:
    """How far back one head looks (queries, channels), (keys, channels)."""
    back = np.exp(-1j * np.arange(len(query))[:, None] * FREQUENCIES)
    q, k = (numbers(t) * back for t in (query, key))
    q, k = q.mean(axis=0), k.mean(axis=0)
    apart = POSITIONS - 1 - np.arange(POSITIONS)
    turned = (q * k.conj() * np.exp(1j * apart[:, None] * FREQUENCIES)).real.sum(axis=-1)
    logits = scale * (turned + query[:, 4:].mean(axis=0) @ key[:, 4:].mean(axis=0))
    weights = np.exp(logits) / np.exp(logits).sum()
    # The area under the attention that keys up to each have in sum.
    return float(np.mean([weights[: j + 1].sum() for j in range(POSITIONS)]))


def scores(trace: Trace, sequences: list[int]) -> dict[tuple[int, int], float]:
    """Of each kv head of layers that see all, the mean over its group and sequences."""
    found = {}
    for layer in trace.layers:
        recorded = trace.layer(layer)
        rules = recorded.rules
        if rules.window is not None:
            continue
        for kv_head in range(rules.kv_heads):
            each = [
                score(
                    recorded.query(s)[h].astype(np.float64),
                    recorded.key(s)[kv_head].astype(np.float64),
                    rules.scale,
                )
                for s in sequences
                for h in range(kv_head * rules.group, (kv_head + 1) * rules.group)
            ]
            found[layer, kv_head] = float(np.mean(each))
    return found


FIRST = 16
"""The first position that counts: sequences for calibration are as long."""
K = 4


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Callable[..., LayerRules]) -> Trace:
    """Three layers of two groups, the second with a window."""
    layers = [
        rules(heads=4, rotation=Rotation(tuple(FREQUENCIES.tolist())), **changes)
        for changes in ({}, {"window": 20}, {})
    ]
    return make_trace(layers, [53, 41, FIRST, FIRST])


def replayed(trace: Trace, specs: list[str], protocol: str = "all") -> Any:
    return analyze(
        trace,
        specs,
        [K],
        protocol=protocol,
        calibration_sequences=[2, 3],
        min_context=FIRST,
        keep_exact=False,
    )


def everything(query: Any) -> list[int]:
    return list(query.best(query.scores, len(query.visible)))


def sinks_and_recent(query: Any) -> list[int]:
    visible = [int(j) for j in query.visible]
    newest = [j for j in visible[::-1] if j > query.position - RECENT and j >= SINK]
    return [*(j for j in visible if j < SINK), *newest]


def test_scores_of_heads(trace: Trace) -> None:
    cpu = torch.device("cpu")
    own = calibration(trace, parse_spec(DUO), (2, 3), trace.layers, cpu, False)[2, 1]
    places = zip(own["layer"].tolist(), own["kv_head"].tolist(), strict=True)
    found = dict(zip(places, own["score"].tolist(), strict=True))
    assert found == pytest.approx(scores(trace, [2, 3]), abs=1e-5)


@pytest.mark.parametrize("streaming", [0.0, 0.25, 0.5, 1.0])
def test_duo_attention(trace: Trace, expected: Any, assert_figures: Any, streaming: float) -> None:
    ranked = scores(trace, [2, 3])
    least = sorted(ranked, key=lambda at: ranked[at])[: round(streaming * len(ranked))]
    results = replayed(trace, [f"{DUO},streaming={streaming}"])
    for layer in trace.layers:

        def select(query: Any, k: int, layer: int = layer) -> list[int]:
            streams = (layer, query.head // 2) in least
            return sinks_and_recent(query) if streams else everything(query)

        figures = expected(trace, select, K, layer=layer, first=FIRST)
        assert_figures(results, str(results.methods()[0]), K, figures, layer=layer)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.6])
def test_simlayerkv(
    trace: Trace, queries_of: Any, expected: Any, assert_figures: Any, threshold: float
) -> None:
    """Judged anew at 16, 32 and 48 keys."""
    results = replayed(trace, [f"{SIM},threshold={threshold}"], "all:16")
    kinds = set()
    for layer in trace.layers:
        last: dict[tuple[int, int], list[float]] = {}
        for group in queries_of(trace, layer):
            for query in group:
                p = query.probabilities[: query.position + 1]
                mass = p[:SINK].sum() + p[-RECENT:].sum()
                last.setdefault((len(query.keys), query.position), []).append(float(mass))

        def select(query: Any, k: int, last: Any = last) -> list[int]:
            judged = query.position // 16 * 16 - 1
            streams = np.mean(last[len(query.keys), judged]) > threshold
            kinds.add(bool(streams))
            return sinks_and_recent(query) if streams else everything(query)

        figures = expected(trace, select, K, layer=layer, first=FIRST)
        assert_figures(results, str(results.methods()[0]), K, figures, layer=layer)
    assert kinds == ({True} if threshold == 0.0 else {True, False})


def test_before_a_layer_is_judged_the_best_keys_are_found(
    make_trace: MakeTrace, rules: Any
) -> None:
    trace = make_trace(rules(heads=4), [15])
    rows = analyze(trace, ["simlayerkv", "exact"], [K], min_context=8, keep_exact=False).metrics
    table = rows.pivot_table(index=["head", "metric"], columns="method", values="mean")
    metrics = ["recall", "error_norm", "density", "bytes_ratio"]
    ours, exact = table.loc[(slice(None), metrics), :].to_numpy().T
    assert (ours == exact).all() and (ours > 0).all()


def test_another_method_answers_the_rest(trace: Trace) -> None:
    """Its figures, and its bytes, are what they are alone."""
    specs = [f"{DUO},of=quest:page=4+least_pages=1", "quest:page=4,least_pages=1", DUO]
    results = replayed(trace, specs)
    rows = results.metrics.pivot_table(
        index=["layer", "head"], columns=["metric", "method"], values="mean"
    )
    names = [str(parse_spec(spec)) for spec in specs]
    ranked = scores(trace, [2, 3])
    least = sorted(ranked, key=lambda at: ranked[at])[:2]
    for metric in ("recall", "error_norm", "attention_fraction", "density", "bytes_ratio"):
        for at in rows.index:
            streams = (at[0], at[1] // 2) in least
            ours, quest, dense = (rows.loc[at, (metric, name)] for name in names)
            assert ours == (dense if streams else quest)
    assert (rows["density", names[1]] != rows["density", names[2]]).all()


def test_a_cache_in_few_bits_holds_for_all_heads(make_trace: MakeTrace, rules: Any) -> None:
    layer = rules(heads=4, key_dim=32, value_dim=32, scale=0.2)
    trace = make_trace(layer, [60])
    specs = ["dense:cache=int4:32", "simlayerkv:recent=60,cache=int4:32"]
    rows = analyze(trace, specs, [K], min_context=16, keep_exact=False).metrics
    table = rows.pivot_table(index=["head", "metric"], columns="method", values="mean")
    metrics = table.loc[(slice(None), ["error_norm", "density", "bytes_ratio"]), :].to_numpy()
    assert (metrics[:, 0] == metrics[:, 1]).all() and (metrics[:, 0] > 0).all()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("duo-attention:of=snapkv", "evicts keys"),
        ("duo-attention:of=flat", "neither scores keys nor computes an output"),
        ("duo-attention:of=loki", "learns from other sequences"),
        ("simlayerkv:of=tidaldecode", "looks at other layers"),
        ("simlayerkv:of=retopk", "answers queries by those before them"),
        ("simlayerkv:of=exact:pool=layer-sum", "selects for all heads of a layer"),
        ("simlayerkv:of=quest:cache=fp8", "name the cache beside it"),
        ("duo-attention:streaming=1.5", "expected a share between 0 and 1"),
        ("simlayerkv:threshold=-1", "expected a share between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(spec: str, words: str) -> None:
    with pytest.raises(RetraceError, match=words):
        parse_spec(spec)
