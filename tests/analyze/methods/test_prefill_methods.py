"""Methods of prefill against their formulas, block by block and in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import BlockMethod, analyze, parse_spec
from retrace.analyze.methods.minference import SEARCHED
from retrace.analyze.methods.toolkit.diagonals import columns_and_diagonals, keys_on_diagonals
from retrace.analyze.replay.calibration import calibration
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Unit, load_units
from retrace.traces import RetraceError, Trace

Array = np.ndarray[Any, np.dtype[Any]]
MakeTrace = Callable[..., Trace]
CPU = torch.device("cpu")
LENGTH, ROWS = 203, 16


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    """Of a length that is no multiple of anything."""
    return make_trace(rules(heads=4, kv_heads=2, key_dim=8), [LENGTH, 90], seed=5)


def chosen(
    spec: str, unit: Unit, k: int, protocol: str = f"prefill:{ROWS}"
) -> list[list[set[int]]]:
    """The units that each head chooses (blocks, heads)."""
    method, asked = parse_spec(spec).method, Protocol.parse(protocol)
    assert isinstance(method, BlockMethod)
    states, found = States(method, unit, asked), []
    for block in unit.blocks(0, 1, asked.block or 1):
        for served in states.serve(block):
            (selection,) = select(method, served, served.block, [k])
            assert selection.choice is not None
            for own in selection.choice.chosen.movedim(1, 0):
                found.append([set(marks.nonzero()[:, 0].tolist()) for marks in own])
    return found


def as_arrays(unit: Unit, head: int) -> tuple[Array, Array]:
    """Scaled queries of a head and the keys, in float64."""
    scale = unit.group.rules.scale
    return unit.queries[head].double().numpy() * scale, unit.keys.double().numpy()


def softmax(scores: Array) -> Array:
    weights: Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def reaching(shares: list[float], order: list[int], forced: set[int], part: float) -> set[int]:
    """The forced ones, and of the others the fewest in order that bring all to a part."""
    total, found = sum(shares), set(forced)
    for j in order:
        if sum(shares[i] for i in found) >= part * total:
            break
        found.add(j)
    return found


def spargeattn(queries: Array, keys: Array, first: int, last: int, block: int) -> set[int]:
    def alike(vectors: Array) -> bool:
        unit = [v / np.linalg.norm(v) for v in vectors]
        return bool(np.mean([[a @ b for a in unit] for b in unit]) > 0.15)

    blocks = [keys[j : min(j + block, last)] for j in range(0, last, block)]
    own = set(range(first // block, len(blocks)))
    if not alike(queries[first:last]):
        return set(range(len(blocks)))
    kept = own | {j for j, some in enumerate(blocks) if not alike(some)}
    mean = queries[first:last].mean(axis=0)
    scores = [mean @ b.mean(axis=0) if alike(b) else -np.inf for b in blocks]
    shares = list(np.exp(np.array(scores) - max(0, *scores)))
    order = sorted(range(len(blocks)), key=lambda j: -shares[j])
    return reaching(shares, [j for j in order if shares[j] > 0], kept, 0.7)


def subblock(queries: Array, keys: Array, first: int, last: int, block: int) -> set[int]:
    size, quarter = block // 2, -(-(last - first) // 2)
    asked = [queries[i : min(i + quarter, last)].mean(axis=0) for i in range(first, last, quarter)]
    scores = []
    for j in range(0, last, block):
        parts = [
            keys[p : min(p + size, last)].mean(axis=0) for p in range(j, min(j + block, last), size)
        ]
        scores.append(np.logaddexp.reduce([a @ b for a in asked for b in parts]))
    own = set(range(first // block, len(scores)))
    count = max(len(own), int(np.ceil(0.25 * len(scores))))
    order = [j for j in sorted(range(len(scores)), key=lambda j: -scores[j]) if j not in own]
    return own | set(order[: count - len(own)])


@pytest.mark.parametrize(
    ("spec", "formula"),
    [
        ("spargeattn:block=8,similarity=0.15,budget=top-p:0.7", spargeattn),
        ("subblock:block=8,parts=2", subblock),
    ],
)
def test_choices_follow_the_formulas(trace: Trace, spec: str, formula: Any) -> None:
    sizes = set()
    for unit in load_units(trace.layer(0), 0, CPU):
        for place, heads in enumerate(chosen(spec, unit, LENGTH)):
            first, last = place * ROWS, min((place + 1) * ROWS, LENGTH)
            for head, ours in enumerate(heads):
                assert ours == formula(*as_arrays(unit, head), first, last, 8)
                sizes.add(len(ours) * 8 < last)
    assert True in sizes  # something is left out somewhere


def test_minference_learns_the_pattern_that_holds_most(make_trace: MakeTrace, rules: Any) -> None:
    """A head that attends a few columns, and one whose blocks each attend some other block."""
    layer, length, size = rules(heads=2, kv_heads=2, key_dim=8, scale=1.0), 600, 8
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(length // size, 8))
    directions *= 5 / np.linalg.norm(directions, axis=-1, keepdims=True)
    keys = np.stack([rng.normal(size=(length, 8)) * 0.1, directions.repeat(size, axis=0)])
    queries = rng.normal(size=(2, length, 8)) * 0.1
    keys[0, [70, 290, 297]] += 20.0
    queries[0] += 1.0
    for block in range(1, length // size):
        queries[1, block * size : (block + 1) * size] = directions[rng.integers(block)]
    tensors = {(0, 0): (queries, keys, rng.normal(size=(2, length, 8)))}
    trace = make_trace(layer, [length, 20], tensors=tensors, name="patterns")
    spec = parse_spec("minference:block=8,tried=40,last=20")
    learnt = calibration(trace, spec, (0,), trace.layers, CPU, False)
    patterns = [SEARCHED[int(learnt[0, head]["pattern"][0])] for head in range(2)]
    assert patterns[0][0] == "vertical-slash" and patterns[0][1] > 0.1
    assert patterns[1] == ("block", 0.0)


def test_diagonals_and_columns_of_rows() -> None:
    shares = torch.tensor([[[1.0, 2.0, 3.0, 0.0], [4.0, 5.0, 6.0, 7.0]]])
    columns, diagonals = columns_and_diagonals(shares)
    assert columns.tolist() == [[5.0, 7.0, 9.0, 7.0]]
    assert diagonals.tolist() == [[7.0 + 3.0, 6.0 + 2.0, 5.0 + 1.0, 4.0]]


@pytest.mark.parametrize("end", [4, 7, 12])
def test_keys_on_diagonals(end: int) -> None:
    rank = torch.tensor([[2, 0, 1, 4, 3, 6, 5, 7]])
    queries = 3
    found = keys_on_diagonals(rank, queries, end)[0].tolist()
    for key in range(end):
        through = [
            int(rank[0, far])
            for far in range(8)
            for query in range(end - queries, end)
            for own in range(end - queries - far, end - far)
            if own == key and query == query
        ]
        assert found[key] == min(through, default=8)


def test_a_block_of_one_query_is_exact_attention(trace: Trace) -> None:
    """Blocks of one query and one key: what `exact` attends, whether by the oracle or pooled."""
    specs = ["block-oracle:block=1,keep=none", "blocks:of=exact,block=1,keep=none"]
    rows = analyze(trace, specs, [9], protocol="prefill:1", layers=[0], keep_exact=False).metrics
    exact = analyze(trace, "exact", [9], min_context=0, keep_exact=False).metrics
    expected = exact.set_index(["metric", "head"])["mean"]
    for spec in specs:
        found = rows[rows["method"] == str(parse_spec(spec))].set_index(["metric", "head"])["mean"]
        for metric in ("recall", "attention_fraction", "error_norm", "density", "top1_hit"):
            np.testing.assert_allclose(found[metric], expected[metric], atol=1e-5)


def test_pooled_scores_of_exact_attention_are_the_oracle(trace: Trace) -> None:
    for unit in load_units(trace.layer(0), 0, CPU):
        ours, theirs = (
            chosen(f"{spec},block=8", unit, 48)
            for spec in ("blocks:of=exact", "block-oracle:keep=recent:1")
        )
        assert ours == theirs


def test_pooled_pages_share_what_a_page_has(trace: Trace) -> None:
    """Of quest: a softmax over the scores of pages, by the keys that each has."""
    page, block = 4, 8
    for unit in load_units(trace.layer(0), 0, CPU):
        found = chosen(f"blocks:of=quest:page={page}+least_pages=1,block={block}", unit, 48)
        for head in range(2):
            queries, keys = as_arrays(unit, head)
            for place, heads in enumerate(found):
                first, end = place * ROWS, min((place + 1) * ROWS, LENGTH)
                shares = np.zeros(-(-end // block))
                for i in range(first, end):
                    bounds = []
                    for j in range(i + 1):
                        own = keys[j // page * page : min(j // page * page + page, i + 1)]
                        most = np.maximum(queries[i] * own.max(0), queries[i] * own.min(0))
                        bounds.append(most.sum())
                    for j, share in enumerate(softmax(np.array(bounds))):
                        shares[j // block] += share
                own_blocks = set(range(first // block, len(shares)))
                others = [
                    j for j in np.argsort(-shares, kind="stable").tolist() if j not in own_blocks
                ]
                count = len(shares) if end <= 48 else 6
                assert heads[head] == own_blocks | set(others[: count - len(own_blocks)])


def test_tri_shape_is_dense_at_the_end(trace: Trace) -> None:
    unit = next(iter(load_units(trace.layer(0), 0, CPU)))
    whole = chosen("tri-shape:block=8,last=20", unit, 32)
    a_shape = chosen("a-shape:block=8", unit, 32)
    for place, (ours, theirs) in enumerate(zip(whole, a_shape, strict=True)):
        end = min((place + 1) * ROWS, LENGTH)
        expected = [set(range(-(-end // 8)))] * 2 if end > LENGTH - 20 else theirs
        assert ours == expected
    for ours in chosen("tri-shape:block=8,dense=1", unit, 32):
        assert all(len(heads) == max(heads) + 1 for heads in ours)


def test_a_shape_is_sinks_and_a_band(trace: Trace) -> None:
    unit = next(iter(load_units(trace.layer(0), 0, CPU)))
    for place, heads in enumerate(chosen("a-shape:block=8", unit, 64)):
        units = -(-min((place + 1) * ROWS, LENGTH) // 8)
        sinks = {0, 1}  # 16 keys are a quarter of the budget
        band = set(range(max(0, units - 6), units))
        expected = sinks | band if units > 8 else set(range(units))
        assert heads == [expected] * 2


def test_seerattention_learns_what_means_do_not_show(make_trace: MakeTrace, rules: Any) -> None:
    """Attention goes to single large keys of blocks whose means are nothing special."""
    layer, length = rules(heads=2, kv_heads=1, key_dim=8, scale=0.5), 256
    rng = np.random.default_rng(1)

    def sequence() -> tuple[Array, Array, Array]:
        keys = rng.normal(size=(1, length, 8))
        for block in range(0, length, 8):
            if rng.random() < 0.3:
                at = block + rng.integers(8)
                keys[0, at, 0] += 9.0
                keys[0, block : block + 8, 0] -= 9.0 / 8
        queries = rng.normal(size=(2, length, 8))
        queries[..., 0] = 2.0
        return queries, keys, rng.normal(size=(1, length, 8))

    tensors = {(0, s): sequence() for s in range(3)}
    trace = make_trace(layer, [length] * 3, tensors=tensors, name="gates")
    rows = analyze(
        trace,
        ["seerattention:block=8", "seerattention:block=8,steps=0", "block-oracle:block=8"],
        [64],
        protocol="prefill:8",
        calibration_sequences=[2],
        keep_exact=False,
    ).metrics
    mass = rows[rows["metric"] == "attention_fraction"].groupby("method")["mean"].mean()
    learnt, untrained, oracle = (
        mass[name]
        for name in (
            "seerattention:block=8",
            "seerattention:block=8,steps=0",
            "block-oracle:block=8",
        )
    )
    assert untrained + 0.5 * (oracle - untrained) < learnt <= oracle + 1e-9


def test_random_blocks_are_drawn_evenly(trace: Trace) -> None:
    unit = next(iter(load_units(trace.layer(0), 0, CPU)))
    counts, blocks = np.zeros(24), 0
    for seed in range(60):
        heads = chosen(f"random-blocks:block=8,seed={seed}", unit, 64)[-1]
        for own in heads:
            blocks += 1
            counts += np.isin(np.arange(24), [*own])
    np.testing.assert_allclose(counts / blocks, 6 / 24, atol=0.13)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("xattention:stride=3", r"xattention: block=128: expected a multiple of stride=3"),
        ("subblock:parts=5", r"subblock: block=64: expected a multiple of parts=5"),
        ("minference:budget=top-p:0.9", r"lines have no scores; expected k or fraction"),
        ("minference:columns=2", r"columns=2.0: expected a share, 0 to 1"),
        ("blocks:of=kivi", r"of=kivi: kivi scores no keys"),
        ("blocks:of=clusterkv", r"of=clusterkv: it is fitted to earlier keys"),
        ("blocks:of=exact:pool=layer-sum", r"it looks at other heads or layers"),
        ("blocks:of=quest:pag=3", r"The method quest has no parameter 'pag'"),
    ],
)
def test_what_cannot_be_is_refused(spec: str, message: str) -> None:
    with pytest.raises(RetraceError, match=message):
        parse_spec(spec)
