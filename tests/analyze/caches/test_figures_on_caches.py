"""Every figure of a method on a cache, query by query from the definitions in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import analyze
from retrace.analyze.methods.options.cache import Cache
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import load_units
from retrace.traces import LayerRules, Trace

K = 6


def layer(**changes: Any) -> LayerRules:
    sizes = {"module": "layer", "heads": 4, "kv_heads": 2, "key_dim": 32, "value_dim": 64}
    return LayerRules(**{**sizes, "scale": 0.2, **changes})


def first_full(name: str, position: int) -> int:
    """The first key in full at a position, by what docs/caches.md says."""
    if name == "int4:channel":
        return position // 32 * 32
    return position // 128 * 128 if name == "kivi:2" else position + 1


def first_full_value(name: str, position: int) -> int:
    return max(0, position - 128) if name == "kivi:2" else first_full(name, position)


@pytest.fixture
def seen(queries_of: Callable[..., Any]) -> Callable[..., Any]:
    """Queries by head and position as a cache shows them, and bytes of keys and values."""

    def of(trace: Trace, name: str) -> tuple[dict[tuple[int, int], Any], Any]:
        held = Cache.parse(name)
        rules = trace.layer(0).rules
        found = {}
        for query in (q for group in queries_of(trace) for q in group):
            keys, values = query.keys.copy(), query.values.copy()
            split, split_value = (f(name, query.position) for f in (first_full, first_full_value))
            few = held.keys.rounded(torch.from_numpy(keys).float()).double().numpy()
            few_values = held.values.rounded(torch.from_numpy(values).float()).double().numpy()
            keys[:split], values[:split_value] = few[:split], few_values[:split_value]
            found[query.head, query.position] = replace(query, keys=keys, values=values)

        def read(position: int, key: int) -> tuple[float, float]:
            full = 2 * rules.key_dim, 2 * rules.value_dim
            few = held.keys.bytes(rules.key_dim), held.values.bytes(rules.value_dim)
            splits = first_full(name, position), first_full_value(name, position)
            one, other = (few[i] if key < splits[i] else full[i] for i in range(2))
            return one, other

        return found, read

    return of


@pytest.mark.parametrize(
    "kind", [{}, {"window": 45, "softcap": 8.0, "sinks": (0.5, -1.0, 2.0, 4.0)}]
)
@pytest.mark.parametrize("name", ["fp8", "int4:token", "int4:channel", "kivi:2"])
@pytest.mark.parametrize("spec", ["exact", "dense", "window:keep=sink:2", "quest:page=4"])
def test_figures_by_definition(
    spec: str,
    name: str,
    kind: dict[str, Any],
    make_trace: Callable[..., Trace],
    tensors: Callable[..., Any],
    queries_of: Callable[..., Any],
    expected: Callable[..., Any],
    assert_figures: Callable[..., None],
    seen: Callable[..., Any],
    tmp_path: Any,
    untried: None,
) -> None:
    """Recall, attention and the reference are those of the originals; the choice, the output and
    the bytes are those of the cache, query by query."""
    rules, rng = layer(**kind), np.random.default_rng(3)
    drawn = tensors(rules, 150, rng)
    # Off the grid, on which rounded keys would tie.
    drawn = tuple((t + 0.1 * rng.normal(size=t.shape)).astype(np.float32) for t in drawn)
    trace = make_trace(rules, [150], tensors={(0, 0): drawn})
    shown, read = seen(trace, name)
    full_spec = str(parse_spec(f"{spec}{',' if ':' in spec else ':'}cache={name}"))
    results = analyze(trace, methods=full_spec, topk=[4, K], out=tmp_path / "r", min_context=20)

    def choose(query: Any, k: int) -> list[int]:
        own = shown[query.head, query.position]
        if spec == "dense":
            best = own.best(own.scores, k)
            return best + [j for j in map(int, own.visible) if j not in best]
        if spec == "exact":
            return own.top(k)
        if spec.startswith("window"):
            near = [j for j in (0, 1) if j in own.visible]
            near += [j for j in reversed(own.visible) if j not in near]
            return near[:k]
        # Bounds of pages are what the method's own tests are for.
        return chosen[query.head, query.position, k]

    chosen = named_keys(trace, full_spec) if spec.startswith("quest") else {}
    for k in (4, K):
        figures = expected(
            trace,
            choose,
            k,
            first=20,
            output=lambda query, ids: shown[query.head, query.position].renormalised(ids),
        )
        assert_figures(results, full_spec, k, figures.drop("bytes_ratio", level=0))
        rows = results.metrics
        rows = rows[(rows.metric == "bytes_ratio") & (rows.topk == k)].set_index("head")
        ratios: dict[int, list[float]] = {}
        for group in queries_of(trace):
            position = group[0].position
            if position < 20:
                continue
            union = {j for query in group for j in choose(query, k)}
            each = [read(position, j) for j in union]
            bytes_read = sum(value for _, value in each)
            visible = group[0].visible
            if spec == "exact":
                bytes_read += sum(read(position, int(j))[0] for j in visible)
            else:
                bytes_read += sum(key for key, _ in each)
            if spec.startswith("quest"):  # bounds stay in bfloat16
                bytes_read += 2 * -(-len(visible) // 4) * 64
            full = len(visible) * (64 + 128)
            for query in group:
                ratios.setdefault(query.head, []).append(bytes_read / full)
        for head, own in ratios.items():
            assert rows.loc[head, "mean"] == pytest.approx(np.mean(own), rel=1e-6)


def named_keys(trace: Trace, spec: str) -> dict[tuple[int, int, int], list[int]]:
    """The keys that each query attends, by head, position and budget."""
    found = {}
    for unit in load_units(trace.layer(0), 0, torch.device("cpu")):
        method, states = parse_spec(spec).method, States(parse_spec(spec).method, unit, Protocol())
        for block in unit.blocks(0):
            for served in states.serve(block):
                for selection in select(method, served, served.block, (4, K)):
                    counts = selection.attended.expand(-1, *selection.ids.shape[:2])
                    for b, k in enumerate(selection.ks):
                        for h, r in np.ndindex(*selection.ids.shape[:2]):
                            ids = selection.ids[h, r, : counts[b, h, r]].tolist()
                            at = (unit.group.heads.start + h, int(served.block.positions[r]), k)
                            found[at] = [j for j in ids if j >= 0]
    return found
