"""RocketKV, InfLLM, ShadowKV, Squeezed Attention and LessIsMore against plain computations."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import analyze, parse_spec
from retrace.analyze.exact.reference import exact_pass
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block, Neighbours, Unit, load_units
from retrace.traces import Rotation, Trace

MakeTrace = Callable[..., Trace]
LENGTH, BUILT = 120, 80
ROWS = slice(BUILT, LENGTH)
HEADS, KV_HEADS, CHANNELS = 4, 2, 8
SCALE = 0.5


@pytest.fixture
def units(make_trace: MakeTrace, rules: Any) -> list[Unit]:
    """Both kv heads of a layer, with tensors of normal numbers."""
    layer = rules(heads=HEADS, kv_heads=KV_HEADS, key_dim=CHANNELS, rotation=Rotation((1.0, 0.3)))
    trace = make_trace(layer, [LENGTH])
    generator = torch.Generator().manual_seed(1)

    def random(unit: Unit) -> Unit:
        shapes = {"keys": unit.keys, "queries": unit.queries, "values": unit.values}
        drawn = {n: 1.4 * torch.randn(t.shape, generator=generator) for n, t in shapes.items()}
        return replace(unit, neighbours=None, **drawn)

    own = [random(unit) for unit in load_units(trace.layer(0), 0, torch.device("cpu"))]
    neighbours = Neighbours((0,), lambda layer: own)
    return [replace(unit, neighbours=neighbours) for unit in own]


def selected(unit: Unit, spec: str, k: int) -> Selection:
    """What is selected for the queries from BUILT on, by a state built there."""
    method = parse_spec(spec).method
    block = Block(unit, ROWS)
    [served] = States(method, unit, Protocol(prefix=BUILT)).serve(block)
    [selection] = select(method, served, block, (k,))
    return selection


def attended(selection: Selection) -> list[list[set[int]]]:
    """The keys attended, by head and query."""
    heads, rows, _ = selection.ids.shape
    counts = selection.attended[0].expand(heads, rows).tolist()
    return [
        [{j for j in selection.ids[h, q, : counts[h][q]].tolist() if j >= 0} for q in range(rows)]
        for h in range(heads)
    ]


def probabilities(unit: Unit, first: int, last: int) -> np.ndarray[Any, Any]:
    """Exact attention (group, queries, BUILT) of the queries from `first` to before `last`."""
    queries, keys = unit.queries[:, first:last].double(), unit.keys[:BUILT].double()
    logits = (SCALE * queries @ keys.T).numpy()
    hidden = np.arange(BUILT) > np.arange(first, last)[:, None]
    weights = np.exp(np.where(hidden, -np.inf, logits))
    return weights / weights.sum(axis=-1, keepdims=True)


def first_of(scores: np.ndarray[Any, Any], count: int) -> list[int]:
    """The largest, ties to the earlier."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_rocketkv(units: list[Unit]) -> None:
    unit = units[1]
    found = attended(selected(unit, "rocketkv:window=6,kernel=5,prompt=0.5,compression=4", 14))
    received = probabilities(unit, BUILT - 6, BUILT).sum(axis=(0, 1))
    before = received[:-6]  # what the window's own keys received is no neighbour's
    smoothed = np.array([before[max(0, i - 2) : i + 3].max() for i in range(BUILT - 6)])
    smoothed = np.append(smoothed, np.full(6, np.inf))
    left = sorted(first_of(smoothed, BUILT // 2))
    keys, page, channels = unit.keys.double().numpy(), 2, CHANNELS * 2 // 4
    for row, position in enumerate(range(BUILT, LENGTH)):
        ids = left + list(range(BUILT, position + 1))
        queries = SCALE * unit.queries[:, position].double().numpy()
        chosen = first_of(np.abs(queries).mean(axis=0), channels)
        positive = queries.sum(axis=0) >= 0
        scores = np.zeros((len(queries), len(ids)))
        for start in range(0, len(ids), page):
            own = keys[ids[start : start + page]]
            extreme = np.where(positive, own.max(axis=0), own.min(axis=0))
            for h, query in enumerate(queries):
                covered = np.abs(query[chosen]).sum() / np.abs(query).sum()
                score = (query * extreme)[chosen].sum() / np.sqrt(covered)
                scores[h, start : start + page] = score
        best = first_of(softmax(scores).sum(axis=0), 14)
        assert all(heads[row] == {ids[i] for i in best} for heads in found)


def test_rocketkv_without_compression_is_exact_for_a_lone_head(
    make_trace: MakeTrace, rules: Any
) -> None:
    trace = make_trace(rules(heads=2, kv_heads=2), [LENGTH])
    specs = ["exact", "rocketkv:prompt=1.0,compression=1"]
    rows = analyze(trace, specs, [5, 20], protocol="prefix:60", min_context=0, keep_exact=False)
    figures = rows.metrics.pivot_table("mean", "method", "metric")
    # A page of one key, all channels and all keys: ties may fall another way, and no mass does.
    np.testing.assert_allclose(*figures["attention_fraction"], atol=1e-6)


def test_infllm(units: list[Unit]) -> None:
    spec = "infllm:block=8,representatives=3,local=20,keep=sink:2+recent:4"
    founds = [attended(selected(unit, spec, 2 + 24)) for unit in units]
    representatives = []
    for unit in units:
        attention = np.concatenate([probabilities(unit, i, i + 1) for i in range(BUILT)], axis=1)
        distance = np.arange(BUILT)[:, None] - np.arange(BUILT)
        received = np.where(distance < 20, attention, 0.0).sum(axis=1)
        for own in received:
            blocks = []
            for start in range(0, BUILT, 8):
                best = first_of(own[start : start + 8], 3)
                blocks.append(unit.keys[[start + i for i in best]].double().mean(dim=0).numpy())
            representatives.append(np.stack(blocks))
    for row, position in enumerate(range(BUILT, LENGTH)):
        queries = torch.cat([unit.queries[:, position] for unit in units]).double().numpy()
        pairs = zip(queries, representatives, strict=True)
        scores = sum(SCALE * query @ own.T for query, own in pairs)
        since = position - BUILT + 1
        recent = {i for i in range(position - 3, position + 1)} | set(range(BUILT, position + 1))
        kept = {0, 1} | recent
        # Keys since the state was built come besides the budget; kept ones count towards it.
        room = 26 - (len(kept) - since)
        blocks = room // 8
        wanted = kept | {8 * block + i for block in first_of(scores, blocks) for i in range(8)}
        for found in founds:
            assert all(heads[row] == wanted for heads in found)


def test_lessismore(units: list[Unit]) -> None:
    """A layer above the one that selects, which is the same here."""
    above = Neighbours((0, 1), lambda layer: units)
    layer = [replace(unit, neighbours=above, group=replace(unit.group, layer=1)) for unit in units]
    founds = [attended(selected(unit, "lessismore:select=0,correct=0", 12)) for unit in layer]
    for row, position in enumerate(range(BUILT, LENGTH)):
        recent, ranked = set(range(position - 2, position + 1)), position - 2
        orders = []
        for unit in units:
            keys = unit.keys[:ranked].double().numpy()
            for query in unit.queries[:, position].double().numpy():
                orders.append(first_of(keys @ query, ranked))
        # The first choice of each head in turn, then the second of each, until nine are found.
        union = dict.fromkeys(order[place] for place in range(9) for order in orders)
        wanted = recent | set(list(union)[: 12 - 3])
        for found in founds:
            assert all(heads[row] == wanted for heads in found)


@pytest.mark.parametrize("spec", ["lessismore", "tidaldecode"])
def test_layers_that_select_attend_all(units: list[Unit], spec: str) -> None:
    for unit in units:
        selection = selected(unit, f"{spec}:select=0,correct=0", 12)
        for heads in attended(selection):
            assert heads == [set(range(position + 1)) for position in range(BUILT, LENGTH)]
        exact = exact_pass(Block(unit, ROWS), 12)
        assert torch.equal(selection.ids[..., :12], exact.ids)  # the best first


@pytest.mark.parametrize("rank", [0, 5])
def test_shadowkv(units: list[Unit], rank: int) -> None:
    unit = units[0]
    spec = f"shadowkv:chunk=4,rank={rank},outliers=3,local=2"
    selection = selected(unit, spec, 16)
    found, count = attended(selection), BUILT // 4 - 2
    keys = unit.keys[: 4 * count].double().numpy()
    chunks = keys.reshape(count, 4, CHANNELS)
    landmarks = chunks.mean(axis=1)
    norms = np.linalg.norm(chunks, axis=-1) * np.linalg.norm(landmarks, axis=-1)[:, None]
    cosine = np.einsum("jic,jc->ji", chunks, landmarks) / norms
    outliers = set(first_of(-cosine.min(axis=1), 3))
    held = unit.keys.double().numpy().copy()
    if rank:
        rotation = unit.group.rules.rotation
        assert rotation is not None
        positions = np.arange(4 * count)
        # Of the whole past, chunks or not.
        plain = [rotation.undo(u.keys[:BUILT].double().numpy(), np.arange(BUILT)) for u in units]
        together = np.concatenate(plain, axis=-1)
        u, s, v = np.linalg.svd(together, full_matrices=False)
        low = ((u[:, :rank] * s[:rank]) @ v[:rank])[: 4 * count]
        turned = rotation.apply(low[:, :CHANNELS], positions)
        for chunk in set(range(count)) - outliers:
            held[4 * chunk : 4 * chunk + 4] = turned[4 * chunk : 4 * chunk + 4]
    assert selection.output is not None
    for row, position in enumerate(range(BUILT, LENGTH)):
        queries = SCALE * unit.queries[:, position].double().numpy()
        there = [j for j in range(count) if j not in outliers]
        together = softmax(queries @ landmarks[there].T).max(axis=0)
        taken = outliers | {there[i] for i in first_of(together, 4)}
        ids = sorted(
            {4 * j + i for j in taken for i in range(4)} | set(range(4 * count, position + 1))
        )
        assert all(heads[row] == set(ids) for heads in found)
        output = softmax(queries @ held[ids].T) @ unit.values[ids].double().numpy()
        ours = selection.output[0, :, row].numpy()
        np.testing.assert_allclose(ours, output, atol=2e-5)
        shared = {4 * j + i for j in taken - outliers for i in range(4)} if rank else set()
        read = (count - 3) * CHANNELS + rank * CHANNELS + len(shared) * (CHANNELS + rank / KV_HEADS)
        read += (len(ids) - len(shared)) * 2 * CHANNELS
        aux = torch.as_tensor(selection.aux_bytes)[row]
        assert selection.attended_bytes is not None
        assert float(aux) + len(ids) * selection.attended_bytes == pytest.approx(2 * read)


def test_squeezed(units: list[Unit]) -> None:
    spec = "squeezed:clusters=0.2,observed=10"
    k, method = 9, parse_spec("squeezed:clusters=0.2,observed=10").method
    labels, centroids = [], []
    for unit in units:
        [served] = States(method, unit, Protocol(prefix=BUILT)).serve(Block(unit, ROWS))
        own = served.state[0]
        labels.append(own.labels.numpy())
        keys = unit.keys[: BUILT - 10].double().numpy()
        means = [keys[labels[-1] == c].mean(axis=0) for c in range(14)]
        centroids.append(np.stack(means))
        np.testing.assert_allclose(own.centroids.numpy(), centroids[-1], atol=1e-5)

    def shares(at: int, head: int, position: int) -> np.ndarray[Any, Any]:
        query = SCALE * units[at].queries[head, position].double().numpy()
        weights = np.exp(centroids[at] @ query)[labels[at]]
        weights = np.where(np.arange(len(weights)) <= position, weights, 0.0)
        return weights / weights.sum()

    means = [
        np.mean([shares(at, head, i) for i in range(BUILT - 10, BUILT)], axis=0)
        for at in range(KV_HEADS)
        for head in range(HEADS // KV_HEADS)
    ]
    threshold = np.sort(np.concatenate(means))[::-1][HEADS * k]
    for at, unit in enumerate(units):
        found = attended(selected(unit, spec, k))
        for row, position in enumerate(range(BUILT, LENGTH)):
            for head, heads in enumerate(found):
                own = shares(at, head, position)
                assert np.abs(own - threshold).min() > 1e-7
                above = set(np.flatnonzero(own > threshold).tolist())
                assert heads[row] == above | set(range(BUILT - 10, position + 1))


def test_squeezed_with_a_threshold_of_nothing_is_exact(units: list[Unit]) -> None:
    block = Block(units[0], ROWS)
    selection = selected(units[0], "squeezed", LENGTH)
    exact = exact_pass(block, 1)
    assert selection.output is not None
    torch.testing.assert_close(selection.output[0], exact.output, rtol=0, atol=1e-5)
