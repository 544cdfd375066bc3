"""Estimates of scores by published methods, against NumPy in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from retrace.analyze import Past, analyze
from retrace.analyze.methods.base import ScoreMethod
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.methods.toolkit.quantisation import rounded
from retrace.analyze.units.unit import Unit, load_units
from retrace.traces import LayerRules, RetraceError, Trace

Array = npt.NDArray[np.float64]
LENGTH = 60


@pytest.fixture
def unit(make_trace: Callable[..., Trace], rules: Callable[..., LayerRules]) -> Unit:
    """Two query heads that share a kv head."""
    trace = make_trace([rules(heads=4)], [LENGTH])
    return next(load_units(trace.layer(0), 0, torch.device("cpu")))


def estimates(spec: str, unit: Unit, start: int = 0) -> tuple[Any, Array]:
    """The state, and scores (group, queries, units) of the queries from `start` on."""
    method: Any = parse_spec(spec).method
    whole = Past(unit, 0, LENGTH)
    learned = method.calibrate([whole]) if method.calibrated else {}
    past = Past(unit, 0, LENGTH, learned)
    assert isinstance(method, ScoreMethod)
    state = method.build(past)
    queries = past.queries[:, start:]
    scores = method.scores(state, queries, torch.arange(start, LENGTH))
    return state, scores.double().numpy()


def exact(unit: Unit) -> Array:
    """Scaled products (group, queries, keys)."""
    queries = unit.queries.double().numpy() * unit.group.rules.scale
    products: Array = queries @ unit.keys.double().numpy().T
    return products


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rounding_is_within_half_a_step(bits: int) -> None:
    vectors = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    low, high = vectors.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    back = rounded(vectors, bits)
    assert bool(((back - vectors).abs() <= step / 2 + 1e-6).all())
    for row in back:
        assert len(row.mul(1e4).round().unique()) <= 2**bits
    torch.testing.assert_close(back.aminmax(dim=-1, keepdim=True), (low, high))


def test_many_bits_are_exact(unit: Unit) -> None:
    _, many = estimates("low-bit:bits=16", unit)
    np.testing.assert_allclose(many, exact(unit), atol=1e-3)
    _, few = estimates("low-bit:bits=2", unit)
    assert np.abs(few - exact(unit)).max() > 0.05


def test_pages_of_one_key_are_exact(unit: Unit) -> None:
    _, scores = estimates("mean-page:page=1", unit)
    np.testing.assert_allclose(scores, exact(unit), atol=1e-5)


def test_mean_of_a_page_up_to_the_query(unit: Unit) -> None:
    _, scores = estimates("mean-page:page=7", unit, start=20)
    queries = unit.queries.double().numpy() * unit.group.rules.scale
    keys = unit.keys.double().numpy()
    for position in range(20, LENGTH):
        for page in range(position // 7 + 1):
            mean = keys[page * 7 : min(page * 7 + 7, position + 1)].mean(axis=0)
            found = scores[:, position - 20, page]
            np.testing.assert_allclose(found, queries[:, position] @ mean, atol=1e-5)


@pytest.mark.parametrize("rank_by", ["product", "query", "key"])
def test_double_sparsity(unit: Unit, rank_by: str) -> None:
    spec = f"double-sparsity:gamma=3,bits=16,rank_by={rank_by}"
    (chosen, _), scores = estimates(spec, unit)
    queries = unit.queries.double().numpy() * unit.group.rules.scale
    keys = unit.keys.double().numpy()
    for head, query in enumerate(queries):
        weight = {"product": np.abs(query * keys), "query": np.abs(query), "key": np.abs(keys)}
        best = np.argsort(-weight[rank_by].mean(axis=0))[: keys.shape[1] // 3]
        assert set(chosen[head].tolist()) == set(best)
        np.testing.assert_allclose(scores[head], query[:, best] @ keys[:, best].T, atol=2e-3)


def test_all_channels_in_many_bits_find_the_best_keys(
    make_trace: Callable[..., Trace], rules: Callable[..., LayerRules]
) -> None:
    trace = make_trace([rules(heads=4)], [60, 50])
    for spec in ("double-sparsity:gamma=1,bits=20", "low-bit:bits=20", "mean-page:page=1"):
        results = analyze(trace, [spec], [5], min_context=0, keep_exact=False)
        rows = results.metrics.query("metric == 'recall'")
        assert rows["mean"].min() > 0.995, spec


@pytest.mark.parametrize("page", [1, 4, 32])
def test_the_largest_score_in_a_box(unit: Unit, page: int) -> None:
    """Of each page up to each query, channel by channel."""
    _, found = estimates(f"arkvale:page={page}", unit)
    keys = unit.keys.double().numpy()
    queries = unit.group.rules.scale * unit.queries.double().numpy()
    for position in range(LENGTH):
        for p in range(position // page + 1):
            held = keys[p * page : min((p + 1) * page, position + 1)]
            centre = (held.min(axis=0) + held.max(axis=0)) / 2
            reach = np.abs(held - centre).mean(axis=0)
            for head, query in enumerate(queries[:, position]):
                sides = query * (centre - reach), query * (centre + reach)
                wanted = np.maximum(*sides).sum()
                assert found[head, position, p] == pytest.approx(wanted, abs=1e-4)
    if page == 1:
        np.testing.assert_allclose(found, exact(unit), atol=1e-5)


def test_tidaldecode_selects_as_the_layer_below_did(
    make_trace: Callable[..., Trace], rules: Callable[..., LayerRules]
) -> None:
    trace = make_trace([rules(heads=4)] * 4, [60])
    results = analyze(
        trace, ["tidaldecode:select=1,correct=3", "exact"], [5], min_context=0, keep_exact=False
    )
    recall = results.metrics.query("metric == 'recall' and method != 'exact'")
    by_layer = recall.groupby("layer")["mean"]
    assert (by_layer.min()[[0, 1, 3]] == 1).all()
    means = results.metrics.query("method != 'exact'").groupby(["metric", "layer"])["mean"]
    for layer in (0, 1, 3):  # where all is attended, and read as full attention reads it
        for metric in ("density", "bytes_ratio", "attention_fraction"):
            np.testing.assert_allclose(
                [means.min()[metric, layer], means.max()[metric, layer]], 1, atol=1e-6
            )
        assert means.max()["error_norm", layer] < 1e-5
    assert means.max()["density", 2] < 0.5
    overlap = []
    layers = [trace.layer(i) for i in (1, 2)]
    for head in range(4):
        best = []
        for layer in layers:
            products = layer.query(0)[head] @ layer.key(0)[head // 2].T
            orders = [np.argsort(-row[: i + 1], kind="stable") for i, row in enumerate(products)]
            best.append([set(order[:5]) for order in orders])
        overlap.append(
            np.mean(
                [len(a & b) / min(5, i + 1) for i, (a, b) in enumerate(zip(*best, strict=True))]
            )
        )
    np.testing.assert_allclose(recall[recall["layer"] == 2]["mean"], overlap, atol=1e-6)


def test_tidaldecode_needs_the_layer_that_selects(
    make_trace: Callable[..., Trace],
    rules: Callable[..., LayerRules],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace = make_trace([rules()] * 4, [30])
    monkeypatch.setattr(Past, "layers", (0, 1, 3))
    with pytest.raises(RetraceError, match="needs layer 2"):
        analyze(trace, ["tidaldecode"], [5], min_context=0, keep_exact=False)
