"""Twilight, vAttention and RetroInfer: what each promises, and a plain computation of each."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retrace.analyze import parse_spec
from retrace.analyze.methods.retroinfer import Clusters, RetroInfer
from retrace.analyze.methods.vattention import VAttention
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import States
from retrace.analyze.units.attention import attend
from retrace.analyze.units.past import Past
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block, Unit, load_units
from retrace.traces import Trace

MakeTrace = Callable[..., Trace]
LENGTH = 200
ROWS = slice(150, 200)


@pytest.fixture
def unit(make_trace: MakeTrace, rules: Any) -> Unit:
    """A group of two heads with attention that is neither flat nor a single key's."""
    trace = make_trace(rules(heads=2, kv_heads=1, key_dim=8), [LENGTH])
    [unit] = load_units(trace.layer(0), 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    shapes = {"keys": unit.keys, "queries": unit.queries, "values": unit.values}
    return replace(
        unit, **{n: 1.5 * torch.randn(t.shape, generator=generator) for n, t in shapes.items()}
    )


def selected(unit: Unit, spec: str, k: int, protocol: Protocol | None = None) -> Selection:
    block = Block(unit, ROWS)
    method = parse_spec(spec).method
    [served] = States(method, unit, protocol or Protocol(prefix=ROWS.start)).serve(block)
    [selection] = select(method, served, block, [k])
    return selection


def chances(unit: Unit) -> Tensor:
    """Exact probabilities (group, queries, keys) float64 of the queries looked at."""
    scale = unit.group.rules.scale
    scores = unit.queries[:, ROWS].double() @ unit.keys.double().T * scale
    keys = torch.arange(LENGTH)
    return scores.masked_fill(keys > unit.positions[ROWS, None], -torch.inf).softmax(-1)


def exact(unit: Unit) -> Tensor:
    return attend(
        unit.queries[:, ROWS].double(),
        unit.keys.double(),
        unit.values.double(),
        unit.positions[ROWS],
        unit.group.rules,
    )


def kept(selection: Selection) -> Tensor:
    """Which keys are attended at the only budget: bool (group, queries, keys)."""
    place = torch.arange(selection.ids.shape[-1])
    attended = place < selection.attended[0][..., None]
    ids = selection.ids.masked_fill(~attended, -1)
    taken = torch.zeros(*ids.shape[:2], LENGTH + 1, dtype=torch.bool)
    return taken.scatter_(-1, torch.where(ids < 0, LENGTH, ids), True)[..., :LENGTH]


@pytest.mark.parametrize("share", [0.5, 0.85, 0.97])
def test_twilight_loses_no_more_mass_than_it_may(unit: Unit, share: float) -> None:
    spec = f"twilight:candidates=1000,bits=16,budget=top-p:{share}"
    taken = kept(selected(unit, spec, LENGTH))
    p = chances(unit)
    mass = (p * taken).sum(-1)
    assert (mass >= share - 1e-3).all()
    least = (p * taken).masked_fill(~taken, 2.0).amin(-1)
    assert (mass - least < share + 1e-3).all()  # one key fewer would not do


def test_twilight_attends_pages_that_quest_ranks_first(unit: Unit) -> None:
    taken = kept(selected(unit, "twilight:candidates=32,page=4,bits=16,budget=k", LENGTH))
    pages = kept(selected(unit, "quest:page=4,least_pages=1", 32))
    assert torch.equal(taken, pages)
    assert not kept(selected(unit, "twilight:candidates=32,page=4", 5))[~pages].any()


def test_vattention_with_a_sample_of_everything_is_exact(unit: Unit) -> None:
    selection = selected(unit, "vattention:sink=2,recent=3,base=1", 5)
    assert selection.output is not None
    torch.testing.assert_close(selection.output[0].double(), exact(unit), rtol=0, atol=1e-5)
    assert torch.equal(kept(selection), chances(unit) > 0)


def denominators(unit: Unit, method: VAttention, k: int) -> tuple[Tensor, Tensor]:
    """The estimated denominator over the true one (group, queries), and the share of keys drawn.

    A constant value of one channel turns the numerator into the denominator.
    """
    past = Past(unit, 0, LENGTH)
    queries = unit.queries[:, ROWS] * unit.group.rules.scale
    logits = (queries @ unit.keys.T).masked_fill(
        torch.arange(LENGTH) > unit.positions[ROWS, None], -torch.inf
    )
    positions = unit.positions[ROWS]
    _, sure, rest = method._split(past, logits, positions, k)
    drawn, count = method._drawn(past, logits, positions, sure, rest, rest.sum(-1))
    assert torch.equal(drawn.sum(-1), count) and not (drawn & ~rest).any()
    weights = logits.double().exp()
    scale = rest.sum(-1) / drawn.sum(-1).clamp(min=1)
    estimate = (weights * sure).sum(-1) + scale * (weights * drawn).sum(-1)
    return estimate / weights.sum(-1), drawn.sum(-1) / rest.sum(-1)


def test_vattention_keeps_its_promise(unit: Unit) -> None:
    method = VAttention(sink=4, recent=8, epsilon=0.1, delta=0.2, base=0.3)
    found = [denominators(unit, replace(method, seed=seed), 8) for seed in range(60)]
    ratio, share = (torch.stack(part) for part in zip(*found, strict=True))
    assert 0.3 < share.mean() < 0.95  # neither everything nor the first sample alone
    missed = (ratio - 1).abs() > method.epsilon
    assert missed.double().mean() <= method.delta
    # Unbiased but for its size, which follows from part of it.
    assert abs(float(ratio.mean()) - 1) < 0.01


def test_vattention_weighs_what_it_draws(unit: Unit) -> None:
    method = VAttention(sink=2, recent=2, base=0.2, epsilon=0.3)
    past, positions = Past(unit, 0, LENGTH), unit.positions[ROWS]
    queries = unit.queries[:, ROWS] * unit.group.rules.scale
    output, ids = method.attend(past, queries, positions, 4)
    logits = (queries @ unit.keys.T).double()
    for head, row in ((0, 0), (1, 17), (0, 49)):
        position = int(positions[row])
        attended = [i for i in ids[head, row].tolist() if i >= 0]
        z = logits[head, row]
        others = [i for i in range(position + 1) if not (i < 2 or i > position - 2)]
        best = sorted(others, key=lambda i: (-float(z[i]), i))[:4]
        sure = {0, 1, position, position - 1, *best}
        assert sure <= set(attended)
        drawn = set(attended) - sure
        rest = position + 1 - len(sure)
        weight = {i: math.exp(z[i]) * (rest / len(drawn) if i in drawn else 1) for i in attended}
        total = sum(weight.values())
        expected = sum(w / total * unit.values[i].double() for i, w in weight.items())
        torch.testing.assert_close(output[head, row].double(), expected, rtol=1e-4, atol=1e-5)


def clusters(unit: Unit, **changes: Any) -> tuple[RetroInfer, Clusters]:
    method = RetroInfer(size=6, segment=50, sink=2, recent=5, **changes)
    return method, method.build(Past(unit, 0, ROWS.start))


def test_retroinfer_with_every_cluster_is_exact(unit: Unit) -> None:
    selection = selected(unit, "retroinfer:size=6", LENGTH)
    assert selection.output is not None
    torch.testing.assert_close(selection.output[0].double(), exact(unit), rtol=0, atol=1e-5)
    assert torch.equal(kept(selection), chances(unit) > 0)


def test_clusters_are_means_of_their_keys(unit: Unit) -> None:
    _, state = clusters(unit)
    members = [
        [2 + i for i, label in enumerate(state.labels.tolist()) if label == cluster]
        for cluster in range(len(state.sizes))
    ]
    assert sorted(i for own in members for i in own) == list(range(2, ROWS.start - 5))
    assert [len(m) for m in members] == state.sizes.tolist()
    for cluster, own in enumerate(members):
        torch.testing.assert_close(state.centroids[cluster], unit.keys[own].mean(0))
        torch.testing.assert_close(state.values[cluster], unit.values[own].mean(0))
        assert min(own) == state.oldest[cluster]


def test_an_estimated_denominator_is_never_too_large(unit: Unit) -> None:
    """Jensen: n exp(q.c) <= sum exp(q.k) over the members of a cluster with mean c."""
    _, state = clusters(unit)
    queries = (unit.queries[:, ROWS] * unit.group.rules.scale).double()
    true = (queries @ unit.keys.double().T).exp()
    sums = torch.zeros(*queries.shape[:2], len(state.sizes), dtype=torch.float64)
    sums.index_add_(-1, state.labels, true[..., 2 : ROWS.start - 5])
    estimated = state.sizes * (queries @ state.centroids.double().T).exp()
    assert (estimated <= sums * (1 + 1e-6)).all()
    assert (estimated < 0.99 * sums).any()


@pytest.mark.parametrize("estimate", [0.0, 0.3])
def test_retroinfer_against_a_plain_computation(unit: Unit, estimate: float) -> None:
    method, state = clusters(unit, estimate=estimate)
    state = method.extend(state, Past(unit, ROWS.start, LENGTH))
    queries = unit.queries[:, ROWS] * unit.group.rules.scale
    output, ids = method.attend(state, queries, unit.positions[ROWS], 12)
    count = len(state.sizes)
    for row in (0, 20, 49):
        position = ROWS.start + row
        q = queries[:, row].double()
        share = (q @ state.centroids.double().T).softmax(-1).sum(0)
        order = sorted(range(count), key=lambda c: (-float(share[c]), c))
        taken: list[int] = []
        for cluster in order:
            if taken and sum(int(state.sizes[c]) for c in [*taken, cluster]) > 12:
                break
            taken.append(cluster)
        means = order[len(taken) : len(taken) + round(estimate * count)]
        members = [i for i in range(2, ROWS.start - 5) if int(state.labels[i - 2]) in taken]
        keys = [0, 1, *members, *range(ROWS.start - 5, position + 1)]
        for head in range(2):
            assert sorted(i for i in ids[head, row].tolist() if i >= 0) == sorted(keys)
            weights = [math.exp(q[head] @ unit.keys[i].double()) for i in keys]
            values = [unit.values[i].double() for i in keys]
            for c in means:
                n = int(state.sizes[c])
                weights.append(n * math.exp(q[head] @ state.centroids[c].double()))
                values.append(state.values[c].double())
            expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
            np.testing.assert_allclose(output[head, row].double(), expected, rtol=1e-4, atol=1e-5)
