"""What published eviction methods think of each key, against NumPy in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from retrace.analyze import Past
from retrace.analyze.methods.base import EvictionMethod
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.units.unit import load_units
from retrace.traces import LayerRules, Trace

Array = npt.NDArray[np.float64]
END = 41


@pytest.fixture(params=[{"heads": 4}, {"heads": 4, "window": 9}], ids=["all", "window"])
def trace(
    request: Any, make_trace: Callable[..., Trace], rules: Callable[..., LayerRules]
) -> Trace:
    """One layer and one sequence."""
    return make_trace([rules(**request.param)], [60])


def past_of(trace: Trace, kv_head: int = 1) -> Past:
    return Past(list(load_units(trace.layer(0), 0, torch.device("cpu")))[kv_head], 0, END)


def attention(trace: Trace, kv_head: int) -> Array:
    """Probabilities (group, queries, keys) of the first `END` positions."""
    layer = trace.layer(0)
    rules, group = layer.rules, layer.rules.group
    query = layer.query(0).astype(np.float64)[kv_head * group : (kv_head + 1) * group, :END]
    key = layer.key(0).astype(np.float64)[kv_head, :END]
    back = np.arange(END)[:, None] - np.arange(END)
    hidden = (back < 0) | (back >= (rules.window or END))
    scores = np.where(hidden, -np.inf, rules.scale * query @ key.T)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def importance(spec: str, past: Past) -> Array:
    method = parse_spec(spec).method
    assert isinstance(method, EvictionMethod)
    return method.importance(past).double().numpy()


def test_snapkv(trace: Trace) -> None:
    found = importance("snapkv:window=8,kernel=5", past_of(trace))
    observed = attention(trace, 1)[:, -8:].mean(axis=1)
    # What the window's own keys received is no neighbour's.
    padded = np.pad(observed[:, :-8], ((0, 0), (2, 2)))
    smoothed = np.stack([padded[:, i : i + 5].mean(axis=1) for i in range(END - 8)], axis=1)
    np.testing.assert_allclose(found[:, :-8], smoothed, atol=1e-6)
    assert (found[:, -8:] > found[:, :-8].max()).all()
    assert (np.diff(found[:, -8:]) > 0).all()  # of a small budget the newest


def test_snapkv_of_fewer_keys_than_its_window(trace: Trace) -> None:
    assert importance("snapkv:window=64", past_of(trace)).shape == (2, END)


def test_tova(trace: Trace) -> None:
    last = [attention(trace, kv_head)[:, -1] for kv_head in range(2)]
    for kv_head in range(2):
        found = importance("tova", past_of(trace, kv_head))
        np.testing.assert_allclose(found, np.concatenate(last).mean(axis=0), atol=1e-6)


def test_r_kv(trace: Trace) -> None:
    found = importance("r-kv:window=6,kernel=3,weight=0.3,similar=0.2", past_of(trace))
    layer, before = trace.layer(0), END - 6
    rules = layer.rules
    keys = layer.key(0).astype(np.float64)[1, :END]
    queries = layer.query(0).astype(np.float64)[2:4, before:END]
    scores = (rules.scale * queries @ keys[:before].T).max(axis=0)
    back = np.arange(before, END)[:, None] - np.arange(before)
    weights = np.where(back >= (rules.window or END), 0.0, np.exp(scores))
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    observed = np.pad(weights.mean(axis=0), 1)
    smoothed = np.array([observed[i : i + 3].max() for i in range(before)])
    units = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    alike = units @ units.T
    np.fill_diagonal(alike, 0.0)
    for row in alike:
        like = np.nonzero(row > 0.2)[0]
        row[like[-1] if len(like) else 0] = 0.0
    redundancy = np.exp(alike.mean(axis=0))
    redundancy /= redundancy.sum()
    wanted = 0.3 * smoothed - 0.7 * redundancy[:before]
    np.testing.assert_allclose(found[0, :before], wanted, atol=1e-6)
    assert (np.diff(found[0, before:]) > 0).all() and found[0, before] > wanted.max()


def test_h2o(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrace.analyze.units.past.SUMMED", 7)
    probabilities = attention(trace, 1)
    total = probabilities.sum(axis=1)
    np.testing.assert_allclose(importance("h2o", past_of(trace)), total, atol=1e-5)
    seen = (probabilities > 0)[0].sum(axis=0)
    np.testing.assert_allclose(importance("h2o:mean=true", past_of(trace)), total / seen, atol=1e-5)


def test_attention_received_does_not_depend_on_which_past_asked_before(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrace.analyze.units.past.SUMMED", 7)
    unit = past_of(trace).unit
    for end in (3, 7, 24, 41, 16, 60, 60):
        fresh = replace(unit)
        alone = Past(fresh, 0, end).attention_received()
        assert torch.equal(Past(unit, 0, end).attention_received(), alone)
        direct = Past(fresh, 0, end).attention(slice(None)).sum(dim=1)
        torch.testing.assert_close(alone, direct)
    some = torch.arange(1, 60, 3)
    few = replace(unit, queries=unit.queries[:, some], positions=some)
    for end in (30, 60, 2, 1):
        past = Past(few, 0, end)
        expected = past.attention(slice(None)).sum(dim=1) if end > 1 else torch.zeros(2, 1)
        torch.testing.assert_close(past.attention_received(), expected)


def test_attention_of_a_layer_is_that_of_its_heads(
    make_trace: Callable[..., Trace], rules: Callable[..., LayerRules]
) -> None:
    sinks = (0.5, -1.0, 2.0, 4.0)
    past = past_of(make_trace([rules(heads=4, softcap=8.0, window=30, sinks=sinks)], [60]))
    for rows in (slice(-1, None), slice(3, 20), torch.tensor([2, 40])):
        heads = torch.stack([head.attention(rows) for head in past.heads])
        torch.testing.assert_close(past.layer_attention(rows), heads)


def test_norm_and_direction(trace: Trace) -> None:
    key = trace.layer(0).key(0).astype(np.float64)[1, :END]
    norm = np.linalg.norm(key, axis=1)
    np.testing.assert_allclose(importance("knorm", past_of(trace)), -norm, rtol=1e-5)
    anchor = (key / norm[:, None]).mean(axis=0)
    cosine = key @ anchor / norm / np.linalg.norm(anchor)
    np.testing.assert_allclose(importance("keydiff", past_of(trace)), -cosine, atol=1e-5)


def test_q_filters(trace: Trace) -> None:
    method = parse_spec("q-filters").method
    assert isinstance(method, EvictionMethod)
    past = past_of(trace)
    learned = method.calibrate([past])
    queries = past.queries.double().numpy().reshape(-1, past.keys.shape[1])
    direction = np.linalg.svd(queries, full_matrices=False)[2][0]
    direction *= np.sign(queries.mean(axis=0) @ direction)
    found = method.importance(Past(past.unit, 0, END, learned)).double().numpy()
    np.testing.assert_allclose(found, past.keys.double().numpy() @ direction, atol=1e-5)
