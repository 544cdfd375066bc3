"""The lightning indexer against NumPy in float64, and what it learns."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
import torch

from retrace.analyze import Past, analyze, calibrate
from retrace.analyze.methods.dsa_indexer import DSAIndexer
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.methods.toolkit.quantisation import fp8
from retrace.analyze.replay.calibration import calibration
from retrace.analyze.units.unit import load_units
from retrace.traces import LayerRules, Trace

Array = npt.NDArray[np.float64]
MakeTrace = Callable[..., Trace]
MakeRules = Callable[..., LayerRules]
LENGTH = 60
SMALL: dict[str, Any] = {"heads": 3, "channels": 5, "steps": 20, "batch": 8}


def pasts_of(trace: Trace, sequence: int, learned: dict[str, torch.Tensor]) -> list[Past]:
    """Both kv heads of the layer."""
    units = load_units(trace.layer(0), sequence, torch.device("cpu"))
    return [Past(unit, 0, len(unit.keys), learned) for unit in units]


def plain_fp8(vector: Array) -> Array:
    """The nearest numbers of 3 bits of mantissa and exponents from -6, once scaled to 448."""
    scale = np.abs(vector).max() / 448
    scaled = vector / scale
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 1e-30))), -6)
    step = 2.0 ** (exponent - 3)
    return np.round(scaled / step) * step * scale


def attention(trace: Trace, sequence: int) -> Array:
    """The mean over all heads of a layer (queries, keys)."""
    layer = trace.layer(0)
    queries, keys = (t.astype(np.float64) for t in (layer.query(sequence), layer.key(sequence)))
    heads = []
    for head, query in enumerate(queries):
        logits = layer.rules.scale * query @ keys[head // layer.rules.group].T
        weights = np.tril(np.exp(logits - logits.max()))
        heads.append(weights / weights.sum(axis=-1, keepdims=True))
    return np.mean(heads, axis=0)


def divergence(target: Array, scores: Array) -> float:
    """The mean over queries of KL(target || softmax of scores), a query's own keys only."""
    found = []
    for i in range(len(target)):
        logits = scores[i, : i + 1]
        logs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        weights = target[i, : i + 1]
        found.append((weights * (np.log(np.maximum(weights, 1e-300)) - logs)).sum())
    return float(np.mean(found))


def test_scores_against_a_plain_one(make_trace: MakeTrace, rules: MakeRules) -> None:
    """One query, one indexer head and one key at a time."""
    trace = make_trace([rules(heads=4)], [LENGTH, 40])
    method = DSAIndexer(**SMALL)
    learned = method.calibrate(pasts_of(trace, 1, {}))
    w = {name: tensor.double().numpy() for name, tensor in learned.items()}
    layer = trace.layer(0)
    queries, keys = (t.astype(np.float64) for t in (layer.query(0), layer.key(0)))
    rotation = scipy.linalg.hadamard(8)[:5] / 8**0.5

    def held(j: int) -> Array:
        key = np.concatenate([keys[0, j], keys[1, j]]) @ w["key"]
        normal = (key - key.mean()) / np.sqrt(key.var() + 1e-5)
        return plain_fp8((normal * w["gain"] + w["bias"]) @ rotation)

    index = np.array([held(j) for j in range(LENGTH)])
    wanted = np.zeros((LENGTH, LENGTH))
    for i in range(LENGTH):
        asked = np.concatenate(list(queries[:, i]))
        shares = np.append(asked, 1) @ w["weight"]
        for head in range(3):
            query = plain_fp8(asked @ w["query"][:, 5 * head : 5 * head + 5] @ rotation)
            wanted[i] += shares[head] / (3 * 5) ** 0.5 * np.maximum(index @ query, 0)
    for past in pasts_of(trace, 0, learned):
        found = method.scores(method.build(past), past.queries, torch.arange(LENGTH))
        assert found.shape == (2, LENGTH, LENGTH)
        for scores in found.double().numpy():
            # A number halfway between two of FP8 may round to either.
            apart = np.abs(scores - wanted) > 1e-4 * (1 + np.abs(wanted))
            assert apart.mean() < 0.01
            np.testing.assert_allclose(scores, wanted, rtol=0.1, atol=0.1)


def test_numbers_of_fp8() -> None:
    vectors = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    back = fp8(vectors)
    assert bool(((back - vectors).abs() <= vectors.abs() / 16 + vectors.abs().max() / 2**17).all())
    largest = vectors.abs().argmax(dim=-1, keepdim=True)
    torch.testing.assert_close(back.gather(-1, largest), vectors.gather(-1, largest))
    assert not fp8(torch.zeros(2, 3)).any()
    np.testing.assert_allclose(
        back.double().numpy(), [plain_fp8(v) for v in vectors.double().numpy()], atol=1e-6
    )


def test_learns_the_attention_of_all_heads(
    make_trace: MakeTrace, rules: MakeRules, tensors: Any
) -> None:
    """Of a sequence that it was not fitted to, whose keys have the same mean."""
    layer = rules(heads=4)
    drawn = tensors(layer, 6 * LENGTH, np.random.default_rng(0))
    parts = (slice(5 * LENGTH, 6 * LENGTH), slice(0, 5 * LENGTH))
    given = {(0, i): tuple(t[:, part] for t in drawn) for i, part in enumerate(parts)}
    trace = make_trace([layer], [LENGTH, 5 * LENGTH], tensors=given)
    target, found = attention(trace, 0), []
    for steps in (0, 50, 200):
        method = DSAIndexer(steps=steps)
        past = pasts_of(trace, 0, method.calibrate(pasts_of(trace, 1, {})))[0]
        scores = method.scores(method.build(past), past.queries, torch.arange(LENGTH))
        found.append(divergence(target, scores[0].double().numpy()))
    assert found[0] > found[1] > found[2]
    assert found[2] < 0.75 * divergence(target, np.zeros_like(target))


def test_fitting_is_the_same_each_time(make_trace: MakeTrace, rules: MakeRules) -> None:
    trace = make_trace([rules(heads=4)], [LENGTH, 40])
    pasts = pasts_of(trace, 1, {})
    one, same, other = (DSAIndexer(**SMALL, seed=seed).calibrate(pasts) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["key"], other["key"])


def test_one_selection_for_all_heads_of_a_layer(make_trace: MakeTrace, rules: MakeRules) -> None:
    """What is attended overlaps by as much as if the keys were named by hand: the same for all."""
    trace = make_trace([rules(heads=4)], [LENGTH, 40])
    spec = parse_spec("dsa-indexer:heads=3,channels=5,steps=20")
    cpu = torch.device("cpu")
    learned = calibration(trace, spec, (1,), (0,), cpu, False)
    assert learned[0, 0] is learned[0, 1]
    chosen = []
    for past in pasts_of(trace, 0, dict(learned[0, 0])):
        scores = spec.method.scores(spec.method.build(past), past.queries, torch.arange(LENGTH))  # type: ignore[attr-defined]
        chosen.extend(scores)
    assert len(chosen) == 4
    assert all(torch.equal(chosen[0], scores) for scores in chosen)
    rows = analyze(
        trace, [str(spec)], [5], min_context=0, calibration_sequences=[1], keep_exact=False
    ).metrics
    # A token's key has 8 numbers of a byte and a scale, half of which each kv head pays for; so
    # do the weights that turn the 32 channels of all queries into 3 heads of 5 and their weights.
    weights = 3 * (32 * 5 + 32 + 1) * 2 / 2
    aux = (8 + 4) / 2 + weights * np.mean(1 / np.arange(1, LENGTH + 1))
    density = rows[rows.metric == "density"]["mean"].mean()
    ratio = rows[rows.metric == "bytes_ratio"]["mean"].mean()
    assert ratio == pytest.approx(density + aux / (2 * 8 * 2), abs=1e-6)


def test_kept_once_for_a_layer(make_trace: MakeTrace, rules: MakeRules) -> None:
    trace = make_trace([rules(heads=4)], [LENGTH, 40], name="own")
    spec = "dsa-indexer:heads=3,channels=5,steps=1"
    (file,) = calibrate(trace, spec, [1])
    with np.load(file, allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["0.bias", "0.gain", "0.key", "0.query", "0.weight"]
    fresh, kept = (
        calibration(trace, parse_spec(spec), (1,), (0,), torch.device("cpu"), keep)
        for keep in (False, True)
    )
    assert fresh.keys() == kept.keys() == {(0, 0), (0, 1)}
    for at, arrays in fresh.items():
        assert all(torch.equal(tensor, kept[at][name]) for name, tensor in arrays.items())
