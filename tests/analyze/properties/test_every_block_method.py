"""What every installed method of prefill must satisfy: a new one is covered as soon as it has a
name."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import BlockMethod, analyze, method_class, method_names, parse_spec
from retrace.analyze.methods.registry import parameter_fields
from retrace.analyze.replay.calibration import calibration
from retrace.analyze.selection.block_causality import check_blocks
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import Calibration, States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block, Unit, load_units
from retrace.traces import LayerRules, Trace

MakeTrace = Callable[..., Trace]
CPU = torch.device("cpu")
SMALL = {
    "a-shape": "block=8",
    "block-oracle": "block=8",
    "blocks": "of=quest:page=4+least_pages=1,block=8",
    "flexprefill": "block=8,least=16",
    "minference": "block=8,last=6,tried=12",
    "random-blocks": "block=8",
    "seerattention": "block=8,steps=3",
    "spargeattn": "block=8,similarity=0.3",
    "subblock": "block=8,parts=2",
    "tri-shape": "block=8,last=5",
    "xattention": "block=8,stride=2",
}
"""Blocks that are small enough for these traces; a new method has 8 as well."""
SPECS = [
    f"{name}:{SMALL.get(name, 'block=8')}"
    for name in method_names()
    if issubclass(method_class(name), BlockMethod)
]
PROTOCOLS = ("prefill:8", "prefill:16", "prefill:16:chunk=32")
KINDS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "own kv heads": {"kv_heads": 4},
    "window": {"window": 21},
    "chunk": {"chunk": 16},
    "softcap": {"softcap": 8.0},
    "sinks": {"sinks": (0.5, -1.0, 2.0, 4.0)},
    "narrow values": {"value_dim": 3},
}
every_method = pytest.mark.parametrize("method", SPECS)


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    """Two layers of 4 heads in 2 groups, and lengths that are no multiples of a block."""
    layer = rules(heads=4, kv_heads=2)
    return make_trace([layer, layer], [77, 40, 53])


def learn(trace: Trace, name: str) -> Calibration:
    return calibration(trace, parse_spec(name), trace.sequences[-1:], trace.layers, CPU, False)


def selected(
    name: str, unit: Unit, protocol: str, ks: list[int], learned: Calibration
) -> list[Selection]:
    """What a method selects for all queries of a unit, block by block."""
    spec, asked = parse_spec(name), Protocol.parse(protocol)
    found = []
    states = States(spec.method, unit, asked, learned)
    for block in unit.blocks(0, 1, asked.block or 1):
        for served in states.serve(block):
            found += select(spec.method, served, served.block, ks)
    return found


def attended(selections: list[Selection]) -> list[list[set[int]]]:
    """The keys of each query of consecutive selections at one budget, head by head."""
    found: list[list[set[int]]] = []
    for selection in selections:
        for row in range(selection.ids.shape[1]):
            one = selection.rows(slice(row, row + 1))
            counts = one.attended.expand(1, len(one.ids), 1)[0, :, 0].tolist()
            ids = one.ids[:, 0].tolist()
            assert all(-1 not in listed[:n] for listed, n in zip(ids, counts, strict=True))
            assert all(len({*listed[:n]}) == n for listed, n in zip(ids, counts, strict=True))
            found.append([{*listed[:n]} for listed, n in zip(ids, counts, strict=True)])
    return found


@every_method
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ["own kv heads", "window", "chunk"])
def test_no_query_attends_a_key_that_it_does_not_see(
    make_trace: MakeTrace, rules: Any, method: str, protocol: str, kind: str
) -> None:
    layer: LayerRules = rules(**{"heads": 4, "kv_heads": 2, **KINDS[kind]})
    trace = make_trace([layer, layer], [77, 40, 53])
    learned = learn(trace, method)
    for unit in load_units(trace.layer(1), 0, CPU):
        for k in (1, 20, 77):
            queries = attended(selected(method, unit, protocol, [k], learned))
            assert len(queries) == 77
            for position, heads in enumerate(queries):
                seen = set(range(layer.first_visible(position), position + 1))
                assert all(ids and ids <= seen for ids in heads)


@every_method
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_queries_of_a_block_share_what_they_see(trace: Trace, method: str, protocol: str) -> None:
    learned, rows = learn(trace, method), Protocol.parse(protocol).block or 1
    for unit in load_units(trace.layer(0), 0, CPU):
        queries = attended(selected(method, unit, protocol, [24], learned))
        for first in range(0, 77, rows):
            last = min(first + rows, 77) - 1
            for position in range(first, last + 1):
                for ids, those in zip(queries[position], queries[last], strict=True):
                    assert ids == {key for key in those if key <= position}


@every_method
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_future_is_not_seen(trace: Trace, method: str, protocol: str) -> None:
    """What comes after the last query that a method says it looks at."""
    spec, learned = parse_spec(method), learn(trace, method)
    assert isinstance(spec.method, BlockMethod)
    for unit in load_units(trace.layer(1), 0, CPU):
        check_blocks(spec.method, unit, Protocol.parse(protocol), [9, 30], learned, spec.anew)


@every_method
def test_later_positions_change_no_choice(trace: Trace, method: str) -> None:
    """Read in chunks, and by a shorter prompt that ends with the second of them."""
    learned = learn(trace, method)
    for unit in load_units(trace.layer(1), 0, CPU):
        early = replace(
            unit,
            queries=unit.queries[:, :32],
            positions=unit.positions[:32],
            keys=unit.keys[:32],
            values=unit.values[:32],
        )
        ours, theirs = (
            attended(selected(method, one, "prefill:8:chunk=16", [12], learned))[:32]
            for one in (unit, early)
        )
        assert ours == theirs


@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_all_keys_are_exact(make_trace: MakeTrace, rules: Any, method: str, kind: str) -> None:
    """A budget of all keys, by methods that attend as many as they may."""
    layer = rules(**{"heads": 4, "kv_heads": 2, **KINDS[kind]})
    trace = make_trace([layer, layer], [77, 40, 53])
    rows = analyze(
        trace,
        f"{method},budget=k",
        [77],
        protocol="prefill:16",
        calibration_sequences=[2],
        keep_exact=False,
    ).metrics
    found = rows.pivot_table("mean", ["layer", "head"], "metric")
    np.testing.assert_allclose(found["error_norm"], 0, atol=2e-4)
    for metric in ("recall", "density", "compute_ratio", "block_recall"):
        np.testing.assert_allclose(found[metric], 1)
    if layer.sinks is None:
        np.testing.assert_allclose(found["attention_fraction"], 1, atol=1e-5)
    counts = rows[rows["metric"] == "compute_ratio"]["count"]
    if layer.window is None and layer.chunk is None:
        assert (counts == 77 * 78 // 2 + 40 * 41 // 2).all()


@every_method
def test_the_oracle_bounds_every_choice(trace: Trace, method: str) -> None:
    """Of blocks as large as many: with as many keys for each block of queries."""
    learned, rows = learn(trace, method), 16
    spec = parse_spec(method).method
    assert isinstance(spec, BlockMethod)
    oracle = parse_spec(f"block-oracle:block={spec.unit_size},keep=none").method
    assert isinstance(oracle, BlockMethod)
    for unit in load_units(trace.layer(0), 0, CPU):
        exact = attention(unit)
        for k in (16, 40):
            for selection in selected(method, unit, f"prefill:{rows}", [k], learned):
                choice = selection.choice
                assert choice is not None
                first = int(selection.ids[0, 0, 0]) // rows * rows  # the own block's come first
                queries = exact[:, first : first + rows]
                units = torch.nn.functional.pad(queries.sum(dim=1), (0, 200)).unfold(
                    -1, spec.unit_size, spec.unit_size
                )
                mass = units.sum(dim=-1)[:, : choice.chosen.shape[-1]]
                ours = (mass * choice.chosen[:, 0]).sum(dim=-1)
                count = choice.chosen[:, 0].sum(dim=-1)
                best = mass.sort(dim=-1, descending=True).values.cumsum(dim=-1)
                bound = best.gather(-1, count[:, None] - 1)[:, 0]
                assert (ours <= bound + 1e-9).all()


def attention(unit: Unit) -> torch.Tensor:
    """Exact attention of all queries (group, queries, keys), in float64."""
    scores = unit.group.rules.scale * (unit.queries.double() @ unit.keys.double().T)
    hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)


def test_figures_follow_their_definitions(trace: Trace) -> None:
    """Of random blocks: ratios of sums over pairs, and recall block by block."""
    spec, k, rows, size = "random-blocks:block=8", 24, 16, 8
    results = analyze(trace, spec, [k], protocol=f"prefill:{rows}", keep_exact=False)
    found = results.metrics.set_index(["metric", "layer", "head"])
    computed, seen, recalls = np.zeros(4), np.zeros(4), [[] for _ in range(4)]
    for sequence in trace.sequences:
        for unit in load_units(trace.layer(0), sequence, CPU):
            exact = attention(unit)
            queries = attended(selected(spec, unit, f"prefill:{rows}", [k], {}))
            for place in range(2):
                head = unit.group.heads.start + place
                computed[head] += sum(len(heads[place]) for heads in queries)
                seen[head] += sum(range(1, len(queries) + 1))
                for first in range(0, len(queries), rows):
                    last = min(first + rows, len(queries))
                    mass = exact[place, first:last].sum(dim=0)
                    blocks = [float(mass[j : j + size].sum()) for j in range(0, last, size)]
                    chosen = {key // size for key in queries[last - 1][place]}
                    best = {*np.argsort(blocks, kind="stable")[::-1][: len(chosen)].tolist()}
                    recalls[head] += [len(best & chosen) / len(chosen)] * (last - first)
    for head in range(4):
        assert found["mean"]["compute_ratio", 0, head] == pytest.approx(computed[head] / seen[head])
        assert found["count"]["compute_ratio", 0, head] == seen[head]
        assert found["mean"]["block_recall", 0, head] == pytest.approx(np.mean(recalls[head]))
        assert found["mean"]["choice_ratio", 0, head] == 0
    assert results.run["methods"][spec]["looks_at"] == "its own block"


def test_what_choosing_costs(trace: Trace) -> None:
    """The oracle computes every score, of blocks that see more than their queries do."""
    rows = analyze(trace, "block-oracle:block=8", [8], protocol="prefill:16", keep_exact=False)
    rules = trace.layer(0).rules
    products = sum(
        min(16, length - first) * min(length, first + 16)
        for length in (77, 40, 53)
        for first in range(0, length, 16)
    )
    whole = sum(length * (length + 1) // 2 for length in (77, 40, 53))
    expected = products * rules.key_dim / (whole * (rules.key_dim + rules.value_dim))
    ratios = rows.metrics.set_index("metric")["mean"]["choice_ratio"]
    np.testing.assert_allclose(ratios, expected)


@every_method
def test_results_do_not_depend_on_how_queries_are_cut(trace: Trace, method: str) -> None:
    learned = learn(trace, method)
    for unit in load_units(trace.layer(1), 0, CPU):
        spec, protocol = parse_spec(method).method, Protocol.parse("prefill:16")
        one_by_one = attended(selected(method, unit, "prefill:16", [20], learned))
        states = States(spec, unit, protocol, learned)
        together = [
            found
            for served in states.serve(Block(unit, slice(0, 77)))
            for found in select(spec, served, served.block, [20])
        ]
        assert attended(together) == one_by_one


@every_method
def test_spec_round_trip(method: str) -> None:
    spec = parse_spec(method)
    listed = ",".join(f"{n}={value}" for n, value in spec.parameters.items() if value is not None)
    assert parse_spec(f"{spec.name}:{listed}").method == spec.method
    assert str(parse_spec(str(spec))) == str(spec)


@every_method
def test_every_method_says_what_it_is(method: str) -> None:
    own = type(parse_spec(method).method)
    assert own.__doc__ and own.source
    assert all(field.metadata.get("help") for field in parameter_fields(own))
    extras = importlib.metadata.metadata("retrace-attention").get_all("Provides-Extra") or []
    assert own.extra is None or own.install or own.extra in extras
