"""Blocks as NSA, InfLLM-V2 and MoBA choose them, against loops over their definitions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import Past, analyze
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.units.unit import load_units
from retrace.traces import LayerRules, Trace

MakeTrace = Callable[..., Trace]
Select = Callable[[Any, int], list[int]]


def pools_of(query: Any, size: int, stride: int) -> dict[int, Any]:
    """The mean key of every pool whose keys are all there at the query, and of which it sees the
    last, by the pool's first key."""
    return {
        start: query.keys[start : start + size].mean(axis=0)
        for start in range(0, query.position + 2 - size, stride)
        if start + size - 1 in query.visible
    }


def attention_to(query: Any, pools: dict[int, Any], others: dict[int, Any]) -> dict[int, float]:
    """The attention of the whole group to each pool, where a head's is divided by its sum over the
    other pools."""
    total = dict.fromkeys(pools, 0.0)
    for head in query.group:

        def logit(mean: Any, head: Any = head) -> float:
            score = float(query.rules.scale * (mean @ head))
            cap = query.rules.softcap
            return score if cap is None else cap * float(np.tanh(score / cap))

        below = sum(np.exp(logit(mean)) for mean in others.values())
        for start, mean in pools.items():
            total[start] += np.exp(logit(mean)) / below
    return total


def overlap(start: int, size: int, block: int, length: int) -> int:
    """How many keys of a pool a block holds."""
    return len(set(range(start, start + size)) & set(range(block * length, (block + 1) * length)))


def best_blocks(
    importance: Callable[[Any], dict[int, float]], block: int, sink: int, recent: int
) -> Select:
    """Sinks and recent keys, then blocks that are not wholly kept, best first, as many whole ones
    as the rest of the budget buys of the visible keys that are not kept."""

    def select(query: Any, k: int) -> list[int]:
        visible = [int(j) for j in query.visible]
        kept = [j for j in visible if j < sink]
        kept += [j for j in visible[::-1] if sink <= j and j > query.position - recent]
        scores = importance(query)
        free = [j for j in visible if j not in kept]
        order = sorted({j // block for j in free}, key=lambda b: (-scores.get(b, -np.inf), b))
        left = k - len(kept)
        count = max(1, left // block) if left > 0 else 0
        return kept + [j for b in order[:count] for j in free if j // block == b]

    return select


def nsa(block: int, size: int, stride: int) -> Callable[[Any], dict[int, float]]:
    """Equations 9 and 10: attention to compressed keys, by what of them a block holds."""

    def importance(query: Any) -> dict[int, float]:
        pools = pools_of(query, size, stride)
        shares = attention_to(query, pools, pools)
        return {
            b: sum(share * overlap(s, size, b, block) / size for s, share in shares.items())
            for b in range(query.position // block + 1)
        }

    return importance


def infllm(
    block: int, size: int, stride: int, coarse: bool = False
) -> Callable[[Any], dict[int, float]]:
    """The most attended of the pools that a block holds a key of."""

    def importance(query: Any) -> dict[int, float]:
        pools = pools_of(query, size, stride)
        others = pools_of(query, 4 * size, 4 * stride) if coarse else pools
        shares = attention_to(query, pools, others or pools)
        return {
            b: max((share for s, share in shares.items() if overlap(s, size, b, block)), default=0)
            for b in range(query.position // block + 1)
        }

    return importance


def moba(block: int) -> Callable[[Any], dict[int, float]]:
    """The query's product with the mean of a block, and its own block above all."""

    def importance(query: Any) -> dict[int, float]:
        own = query.position // block
        means = {b: query.keys[b * block : (b + 1) * block].mean(axis=0) for b in range(own)}
        return {**{b: float(mean @ query.query) for b, mean in means.items()}, own: np.inf}

    return importance


CASES = [
    ("nsa:block=8,kernel=4,stride=2,keep=sink:3+recent:5", nsa(8, 4, 2), 8, 3, 5),
    ("nsa:block=6,kernel=5,stride=3,keep=none", nsa(6, 5, 3), 6, 0, 0),
    ("infllm-v2:block=8,kernel=4,stride=2,keep=sink:3+recent:5", infllm(8, 4, 2), 8, 3, 5),
    ("infllm-v2:block=6,kernel=5,stride=3,keep=none", infllm(6, 5, 3), 6, 0, 0),
    (
        "infllm-v2:block=8,kernel=4,stride=2,denominator=coarse,keep=sink:8",
        infllm(8, 4, 2, coarse=True),
        8,
        8,
        0,
    ),
    ("moba:page=8", moba(8), 8, 0, 0),
]


@pytest.mark.parametrize(("spec", "importance", "block", "sink", "recent"), CASES)
def test_every_kind_of_layer(
    make_trace: MakeTrace,
    expected: Any,
    assert_figures: Any,
    any_rules: LayerRules,
    spec: str,
    importance: Any,
    block: int,
    sink: int,
    recent: int,
) -> None:
    trace = make_trace(any_rules)
    select = best_blocks(importance, block, sink, recent)
    results = analyze(trace, [spec], [3, 21], min_context=0, keep_exact=False)
    for k in (3, 21):
        figures = expected(trace, select, k, first=0).drop("bytes_ratio")
        assert_figures(results, results.methods()[0], k, figures)


@pytest.mark.parametrize(
    ("spec", "pools"),
    [
        ("nsa:block=8,kernel=4,stride=2,keep=none", lambda n: len(range(0, n - 3, 2))),
        ("infllm-v2:block=8,kernel=4,stride=2,keep=none", lambda n: len(range(0, n - 3, 2))),
        (
            "infllm-v2:block=8,kernel=4,stride=2,denominator=coarse,keep=none",
            lambda n: len(range(0, n - 3, 2)) + len(range(0, n - 15, 8)),
        ),
    ],
)
def test_bytes_are_those_of_pools(
    make_trace: MakeTrace, rules: Any, spec: str, pools: Callable[[int], int]
) -> None:
    trace = make_trace(rules(heads=2, kv_heads=1), [61])
    unit = next(iter(load_units(trace.layer(0), 0, torch.device("cpu"))))
    method = parse_spec(spec).method
    keys = torch.arange(1, 62)
    found = method.aux_bytes(method.build(Past(unit, 0, 61)), keys, unit.group)
    wanted = [pools(int(n)) * unit.group.key_bytes for n in keys]
    assert torch.as_tensor(found).tolist() == wanted


@pytest.mark.parametrize("name", ["nsa", "infllm-v2"])
def test_a_pool_is_seen_once_it_is_complete(make_trace: MakeTrace, rules: Any, name: str) -> None:
    """The last pool would draw all attention, and its last key comes one position later."""
    key = np.zeros((1, 12, 8))
    key[:, 8:] = 100.0
    trace = make_trace(
        rules(heads=1, kv_heads=1), [12], tensors={(0, 0): (np.ones((1, 12, 8)), key, key)}
    )
    unit = next(iter(load_units(trace.layer(0), 0, torch.device("cpu"))))
    method: Any = parse_spec(f"{name}:block=4,kernel=4,stride=4,keep=none").method
    state = method.build(Past(unit, 0, 12))
    positions = torch.tensor([10, 11])
    scores = method.scores(state, unit.queries[:, positions], positions)[0]
    assert scores.argmax(dim=-1).tolist() == [0, 2]


def test_moba_reads_its_own_block_when_it_is_the_worst(make_trace: MakeTrace, rules: Any) -> None:
    key = np.ones((1, 12, 8))
    key[:, 8:] = -50.0
    trace = make_trace(
        rules(heads=1, kv_heads=1), [12], tensors={(0, 0): (np.ones((1, 12, 8)), key, key)}
    )
    unit = next(iter(load_units(trace.layer(0), 0, torch.device("cpu"))))
    method: Any = parse_spec("moba:page=4").method
    state = method.build(Past(unit, 0, 12))
    scores = method.scores(state, unit.queries, unit.positions)[0]
    own = unit.positions // 4
    for position, row in enumerate(scores):
        assert int(row[: int(own[position]) + 1].argmax()) == int(own[position])
