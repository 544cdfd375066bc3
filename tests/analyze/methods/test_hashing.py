"""Methods that hash, rotate or learn bits, against NumPy and against what defines each."""

from collections.abc import Callable
from itertools import product
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
import torch

from retrace.analyze import Past
from retrace.analyze.methods.hata import _labels as hata_labels
from retrace.analyze.methods.magicpig import MagicPIG
from retrace.analyze.methods.pariskv import BOUNDS, LEVELS, RATIOS, TIERS
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.methods.toolkit.hashing import hadamard, hyperplanes, numbers, signs
from retrace.analyze.methods.toolkit.partial_attention import merged, part, visible_logits
from retrace.analyze.units.unit import Unit, load_units
from retrace.traces import LayerRules, Trace

Array = npt.NDArray[np.float64]
MakeTrace = Callable[..., Trace]
MakeRules = Callable[..., LayerRules]
LENGTH = 60


@pytest.fixture(params=[8, 12])
def unit(request: pytest.FixtureRequest, make_trace: MakeTrace, rules: MakeRules) -> Unit:
    """Two query heads that share a kv head, of channels that are a power of two or not, and off the
    grid of other tests' vectors, where rotated elements would be 0 or on a bound."""
    return unit_of(make_trace, rules(heads=2, kv_heads=1, key_dim=request.param))


def unit_of(make_trace: MakeTrace, layer: LayerRules, length: int = LENGTH) -> Unit:
    """The unit of a layer of one kv head whose queries and keys are standard normal."""
    rng = np.random.default_rng(0)
    shapes = ((layer.heads, layer.key_dim), (1, layer.key_dim), (1, layer.value_dim))
    tensors = tuple(rng.normal(size=(heads, length, channels)) for heads, channels in shapes)
    trace = make_trace([layer], [length], tensors={(0, 0): tensors})
    return next(load_units(trace.layer(0), 0, torch.device("cpu")))


def estimates(spec: str, unit: Unit, start: int = 0) -> tuple[Any, Array]:
    """The state, and scores (group, queries, keys) of the queries from `start` on."""
    method: Any = parse_spec(spec).method
    past = Past(unit, 0, LENGTH)
    state = method.build(past)
    queries = past.queries[:, start:]
    if method.pool == "mean-query":
        queries = queries.mean(dim=0, keepdim=True)
    scores = method.scores(state, queries, torch.arange(start, LENGTH))
    return state, scores.double().numpy()


def raw(unit: Unit) -> tuple[Array, Array]:
    """Queries (group, queries, channels) before scaling, and keys."""
    return unit.queries.double().numpy(), unit.keys.double().numpy()


@pytest.mark.parametrize("channels", [1, 5, 8, 24])
def test_rotation_is_the_hadamard_matrix(channels: int) -> None:
    vectors = torch.randn(7, channels, dtype=torch.float64)
    rotated = hadamard(vectors)
    width = rotated.shape[1]
    assert channels <= width < 2 * channels or width == 1
    matrix = scipy.linalg.hadamard(width) / width**0.5
    np.testing.assert_allclose(rotated, vectors.numpy() @ matrix[:channels], atol=1e-12)
    torch.testing.assert_close(rotated @ rotated.T, vectors @ vectors.T)


def test_hyperplanes_are_standard_normal_and_differ_by_head(unit: Unit) -> None:
    planes = hyperplanes(0, unit.group, 4000, torch.device("cpu"))
    assert planes.isfinite().all()
    covariance = np.cov(planes.numpy())
    np.testing.assert_allclose(covariance, np.eye(len(covariance)), atol=0.1)
    assert not torch.equal(planes, hyperplanes(1, unit.group, 4000, torch.device("cpu")))


def test_signs_give_the_hamming_distance() -> None:
    one, other = torch.randn(2, 20, 37)
    differing = (37 - signs(one) @ signs(other).T) / 2
    wanted = ((one >= 0)[:, None] != (other >= 0)[None]).sum(dim=-1)
    assert (differing == wanted).all()
    assert numbers(torch.tensor([[True, False, True], [False, True, False]])).tolist() == [5, 2]


@pytest.mark.parametrize(("bits", "tables", "least"), [(2, 4, 2), (1, 3, 1), (3, 9, 2)])
def test_magicpig_samples_as_often_as_it_says(
    unit: Unit, bits: int, tables: int, least: int
) -> None:
    """Over seeds: frequency of selection, numerator and denominator."""
    past, positions, rounds = Past(unit, 0, LENGTH), torch.tensor([LENGTH - 1]), 600
    settings: dict[str, Any] = {"bits": bits, "tables": tables, "min_collisions": least}
    sink, window = 2, 5
    hashed = slice(sink, LENGTH - window)
    count = torch.zeros(2, 1, LENGTH)
    queries = past.queries[:, -1:] / 3  # so that no one key decides
    estimate = torch.zeros(2, 1, 1 + unit.values.shape[1], dtype=torch.float64)
    logits = visible_logits(past, queries, positions).double()
    values = torch.nn.functional.pad(unit.values.double(), (1, 0), value=1.0)
    for seed in range(rounds):
        method = MagicPIG(**settings, sink=sink, window=window, offset=0.0, seed=seed)
        state = method.build(past)
        output, ids = method.attend(state, queries, positions, 1)
        chosen = torch.zeros_like(count).scatter(-1, ids.clamp(min=0), (ids >= 0).float())
        # The id -1 was written at 0, a sink, which is always chosen.
        chosen[..., 0] = 1
        count += chosen
        pi = torch.ones_like(logits)
        pi[..., hashed] = method.inclusion(queries, state[2])
        weights = chosen * logits.exp() / pi
        estimate += weights @ values
        wanted = (weights @ values)[..., 1:] / weights.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(output.double(), wanted, atol=1e-4, rtol=1e-4)
    spread = (pi * (1 - pi) / rounds).sqrt()
    assert ((count / rounds - pi).abs() <= 4.5 * spread + 1e-6).all()
    exact = logits.exp() @ values
    # Keys of a table are not independent of each other: a bound that holds for any dependence.
    error = (spread / pi * logits.exp()) @ values.abs()
    assert ((estimate / rounds - exact).abs() <= 3 * error).all()


def test_magicpig_inclusion_is_that_of_the_paper(unit: Unit) -> None:
    method = MagicPIG(bits=3, tables=7)
    queries, keys = raw(unit)
    centred = keys - keys.mean(axis=0)
    found = method.inclusion(unit.queries, torch.from_numpy(centred))
    norms = np.linalg.norm(queries, axis=-1)[..., None] * np.linalg.norm(centred, axis=-1)
    u = 1 - np.arccos(np.clip(queries @ centred.T / norms, -1, 1)) / np.pi
    pi = 1 - (1 - u**3) ** 7 - 7 * u**3 * (1 - u**3) ** 6
    np.testing.assert_allclose(found, pi, atol=1e-7)
    three = MagicPIG(bits=3, tables=7, min_collisions=3).inclusion(
        unit.queries, torch.from_numpy(centred)
    )
    np.testing.assert_allclose(three, pi - comb(7, 2) * u**6 * (1 - u**3) ** 5, atol=1e-7)


def test_magicpig_attends_later_keys_and_centres_on_earlier_ones(unit: Unit) -> None:
    method = MagicPIG(bits=8, tables=2, sink=2, window=5)
    state = method.extend(method.build(Past(unit, 0, 30)), Past(unit, 30, LENGTH))
    torch.testing.assert_close(state[2], unit.keys[2:25] - unit.keys[2:25].mean(dim=0))
    past, positions = Past(unit, 0, LENGTH), torch.arange(40, LENGTH)
    queries = past.queries[:, 40:]
    _, ids = method.attend(state, queries, positions, 3)
    for row, position in enumerate(positions.tolist()):
        for head in range(2):
            attended = set(ids[head, row].tolist()) - {-1}
            assert {0, 1, *range(25, position + 1)} <= attended
    every = MagicPIG(bits=1, tables=1, sink=0, window=LENGTH)
    whole, _ = every.attend(every.build(past), queries, positions, 3)
    logits = visible_logits(past, queries, positions)
    torch.testing.assert_close(whole, merged([part(logits, past.values)]))


@pytest.mark.parametrize("divide", ["nothing", "root-channels"])
def test_socket_is_a_softmax_over_buckets(unit: Unit, divide: str) -> None:
    _, scores = estimates(f"socket:tables=3,bits=4,temperature=0.7,divide={divide}", unit, 50)
    queries, keys = raw(unit)
    channels = keys.shape[1]
    planes = hyperplanes(0, unit.group, 12, torch.device("cpu")).double().numpy()
    corners = np.array(list(product((-1, 1), repeat=4)))
    root = channels**0.5 if divide == "root-channels" else 1
    wanted = np.zeros_like(scores)
    for table in range(3):
        own = planes[:, 4 * table : 4 * table + 4]
        soft = np.tanh(queries[:, 50:] @ own) / root @ corners.T / 0.7
        chances = np.exp(soft) / np.exp(soft).sum(axis=-1, keepdims=True)
        buckets = [
            np.flatnonzero((corners == np.where(k @ own >= 0, 1, -1)).all(1))[0] for k in keys
        ]
        wanted += chances[..., buckets]
    wanted *= np.linalg.norm(unit.values.double().numpy(), axis=1)
    np.testing.assert_allclose(scores, wanted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("spec", ["socket:tables=5,bits=6", "adamas", "adamas:bounds=deviation"])
def test_a_key_like_the_query_scores_highest(
    make_trace: MakeTrace, rules: MakeRules, spec: str
) -> None:
    rng = np.random.default_rng(0)
    key = rng.normal(size=(1, LENGTH, 12))
    value = rng.normal(size=(1, LENGTH, 8))
    value /= np.linalg.norm(value, axis=-1, keepdims=True)
    trace = make_trace(
        [rules(heads=1, kv_heads=1, key_dim=12)], [LENGTH], tensors={(0, 0): (key, key, value)}
    )
    unit = next(load_units(trace.layer(0), 0, torch.device("cpu")))
    _, scores = estimates(spec, unit)
    own = np.arange(LENGTH)
    assert (scores[0, own, own] >= scores[0].max(axis=-1) - 1e-6).all()


@pytest.mark.parametrize("bounds", ["fixed", "deviation"])
def test_adamas_counts_buckets_between(unit: Unit, bounds: str) -> None:
    _, scores = estimates(f"adamas:bounds={bounds},step=0.7", unit)
    width = 8 if unit.keys.shape[1] == 8 else 16
    matrix = scipy.linalg.hadamard(width).astype(float)

    def buckets(vectors: Array) -> Array:
        rotated = vectors @ matrix[: vectors.shape[-1]]
        if bounds == "deviation":
            rotated /= np.sqrt(np.square(rotated).mean(axis=-1, keepdims=True))
        return sum((rotated > bound).astype(float) for bound in (-0.7, 0.0, 0.7))  # type: ignore[return-value]

    queries, keys = map(buckets, raw(unit))
    wanted = -np.abs(queries[:, :, None] - keys).sum(axis=-1)
    # A channel that falls on a bound may round to either side.
    assert (np.abs(scores - wanted) > 0.5).mean() < 0.02


def test_adamas_in_many_bits_is_the_manhattan_distance(unit: Unit) -> None:
    _, scores = estimates("adamas:bits=16,step=0.01", unit)
    queries, keys = raw(unit)
    width = 8 if keys.shape[1] == 8 else 16
    matrix = scipy.linalg.hadamard(width)[: keys.shape[1]]
    wanted = -np.abs((queries @ matrix)[:, :, None] - keys @ matrix).sum(axis=-1)
    np.testing.assert_allclose(scores * 0.01, wanted, atol=0.01 * width)


def test_pariskv_against_a_plain_one(unit: Unit) -> None:
    """Votes, candidates and scores, one query and one key at a time."""
    state, scores = estimates("pariskv", unit, 40)
    queries, keys = raw(unit)
    flips = state[1].double().numpy()
    width = 8 if keys.shape[1] == 8 else 16
    matrix = scipy.linalg.hadamard(width)[: keys.shape[1]] / width**0.5
    asked = (queries * unit.group.rules.scale).mean(axis=0) * flips @ matrix
    held = keys * flips @ matrix
    corners = np.array(list(product((-1, 1), repeat=8)))
    _, beta, rho = RATIOS[0]
    for row, position in enumerate(range(40, LENGTH)):
        seen = position + 1
        votes = np.zeros(seen)
        for block in range(0, width, 8):
            query, own = asked[position, block : block + 8], held[:seen, block : block + 8]
            taken = 0
            for corner in corners[np.argsort(-(corners @ query), kind="stable")]:
                here = (np.where(own >= 0, 1, -1) == corner).all(axis=1)
                tier = sum(taken >= share * rho * seen for share in TIERS)
                votes[here] += 6 - tier
                taken += here.sum()
        candidates = np.argsort(-votes, kind="stable")[: int(np.ceil(beta * seen))]
        found = set(np.flatnonzero(np.isfinite(scores[0, row])))
        assert len(found) == len(candidates)
        assert len(found & set(candidates)) >= len(found) - 1  # a rotated element may round to 0
        for j in found:
            estimate = 0.0
            for block in range(0, width, 8):
                own = held[j, block : block + 8]
                norm = np.linalg.norm(own)
                code = np.array(LEVELS)[np.searchsorted(BOUNDS, np.abs(own) / norm)]
                weight = norm / (code @ np.abs(own) / norm)
                estimate += weight * (
                    np.where(own >= 0, code, -code) @ asked[position, block : block + 8]
                )
            assert abs(scores[0, row, j] - estimate) < 0.02 * (1 + abs(estimate))


@pytest.mark.parametrize("channels", [64, 80])
def test_pariskv_estimates_products_without_bias(
    make_trace: MakeTrace, rules: MakeRules, channels: int
) -> None:
    unit = unit_of(make_trace, rules(heads=1, kv_heads=1, key_dim=channels))
    _, scores = estimates("pariskv:rerank=1", unit)
    queries, keys = raw(unit)
    exact = (queries * unit.group.rules.scale) @ keys.T
    chosen = np.isfinite(scores)
    assert chosen.sum() == LENGTH * (LENGTH + 1) / 2
    slope, offset = np.polyfit(exact[chosen], scores[chosen], 1)
    assert abs(slope - 1) < 0.02 and abs(offset) < 0.05 * exact[chosen].std()
    assert np.corrcoef(exact[chosen], scores[chosen])[0, 1] > 0.99


def learnable(make_trace: MakeTrace, rules: MakeRules) -> list[Unit]:
    """Sequences whose logits come from 4 of 16 channels, since queries have little in the others,
    while keys have as much there, and a large mean that splits no keys."""
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    spread = np.array([2.0] * 4 + [0.05] * 12)
    mean = 10 * rng.normal(size=16)
    tensors = {
        (0, sequence): (
            (rng.normal(size=(2, 200, 16)) * spread) @ turn,
            2 * rng.normal(size=(1, 200, 16)) @ turn + mean,
            rng.normal(size=(1, 200, 8)),
        )
        for sequence in range(2)
    }
    layer = rules(heads=2, kv_heads=1, key_dim=16)
    trace = make_trace([layer], [200, 200], tensors=tensors)
    return [next(load_units(trace.layer(0), s, torch.device("cpu"))) for s in range(2)]


def held_out_recall(spec: str, units: list[Unit]) -> float:
    """recall@10 on one sequence of what is learned from the other."""
    method: Any = parse_spec(spec).method
    learned = method.calibrate([Past(units[0], 0, 200)])
    past = Past(units[1], 0, 200, learned)
    queries = past.queries  # of one law at every position, so that all are asked of all keys
    found = method.scores(method.build(past), queries, torch.tensor([199])).topk(10).indices
    best = (queries @ past.keys.T).topk(10).indices
    return float((found[..., None] == best[..., None, :]).any(dim=-1).double().mean())


@pytest.mark.parametrize("spec", ["hata:bits=16", "hashattention:bits=16,steps=150"])
def test_learning_beats_random_hyperplanes(
    make_trace: MakeTrace, rules: MakeRules, spec: str
) -> None:
    units = learnable(make_trace, rules)
    random = [held_out_recall(f"hata:bits=16,steps=0,seed={seed}", units) for seed in range(5)]
    assert held_out_recall(spec, units) > 1.3 * max(random)


@pytest.mark.parametrize("spec", ["hata:bits=16", "hashattention:bits=16,steps=20"])
def test_learning_is_the_same_on_every_run(
    make_trace: MakeTrace, rules: MakeRules, spec: str
) -> None:
    past = Past(learnable(make_trace, rules)[0], 0, 200)
    method: Any = parse_spec(spec).method
    one = method.calibrate([past])
    torch.set_num_threads(2)
    torch.manual_seed(3)  # the state of others' random numbers is not read
    try:
        other = method.calibrate([past])
    finally:
        torch.set_num_threads(1)
    for name, weights in one.items():
        torch.testing.assert_close(other[name], weights, atol=1e-5, rtol=1e-5)


def test_hata_counts_bits_that_differ(unit: Unit) -> None:
    method: Any = parse_spec("hata:bits=20,steps=3").method
    learned = method.calibrate([Past(unit, 0, LENGTH)])
    past = Past(unit, 0, LENGTH, learned)
    weights = learned["weights"].double().numpy()
    queries, keys = raw(unit)
    differing = ((queries @ weights >= 0)[:, :, None] != (keys @ weights >= 0)).sum(axis=-1)
    scores = method.scores(method.build(past), past.queries, torch.arange(LENGTH))
    np.testing.assert_array_equal(scores, -differing)
    alike = method.scores(method.build(past), past.keys[None], torch.arange(LENGTH))[0]
    assert (alike.diagonal() == 0).all() and alike.max() == 0


def test_hata_labels_fall_over_the_best_tenth() -> None:
    logits = torch.arange(40.0)[None]
    labels = hata_labels(logits, torch.arange(40)[None] < 30)[0]
    assert labels[27:30].tolist() == [1.0, 10.5, 20.0]
    assert (labels[:27] == -1).all() and (labels[30:] == 0).all()


def test_hashattention_is_two_networks_a_head(unit: Unit) -> None:
    method: Any = parse_spec("hashattention:bits=11,hidden=7,steps=2").method
    learned = method.calibrate([Past(unit, 0, LENGTH)])
    past = Past(unit, 0, LENGTH, learned)
    scores = method.scores(method.build(past), past.queries, torch.arange(LENGTH))

    def network(side: str, head: int, x: Array) -> Array:
        for i in range(3):
            layer = learned[f"{side}.{i}"][head].double().numpy()
            x = np.concatenate([x, np.ones((len(x), 1))], axis=1) @ layer
            x = x / (1 + np.exp(-x)) if i < 2 else x
        return x

    queries, keys = raw(unit)
    for head in range(2):
        asked, codes = network("query", head, queries[head]), network("key", head, keys)
        differing = ((asked >= 0)[:, None] != (codes >= 0)).sum(axis=-1)
        np.testing.assert_array_equal(scores[head], -differing)
