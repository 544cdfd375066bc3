"""What is evicted is gone: no later query attends it, whatever is kept and however a layer sees."""

from collections.abc import Callable

import pytest
import torch

from retrace.analyze import parse_spec
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Block, Unit, load_units
from retrace.traces import LayerRules, Rotation, Trace

MakeTrace = Callable[..., Trace]
Rules = Callable[..., LayerRules]
END, LENGTH = 60, 120
KEEPS = ["", "keep=recent:8", "keep=sink:2+recent:0.5k"]
SPECS = {
    "adakv": "window=8",
    "expected-attention": "future=16",
    "h2o": "",
    "keydiff": "",
    "knorm": "",
    "pyramidkv": "window=8",
    "rocketkv": "window=4,kernel=3",
    "snapkv": "window=8",
    "tova": "",
}
"""Methods that evict, with parameters that leave something to evict."""


def spec_of(method: str, keep: str) -> str:
    parameters = ",".join(filter(None, (SPECS[method], keep)))
    return f"{method}:{parameters}" if parameters else method


def held(spec: str, unit: Unit, protocol: Protocol, ks: list[int]) -> list[list[list[set[int]]]]:
    """The keys attended by each query from END on, one block a query: (queries, budgets, heads)."""
    method = parse_spec(spec).method
    states = States(method, unit, protocol)
    found = []
    for row in range(END, len(unit.positions)):
        block = Block(unit, slice(row, row + 1))
        [served] = states.serve(block)
        of_budgets = {}
        for selection in select(method, served, block, ks):
            for k, attended in zip(selection.ks, selection.attended, strict=True):
                counts = attended.expand(len(selection.ids), 1)[:, 0].tolist()
                heads = zip(selection.ids[:, 0].tolist(), counts, strict=True)
                of_budgets[k] = [{j for j in ids[:count] if j >= 0} for ids, count in heads]
        found.append([of_budgets[k] for k in ks])
    return found


@pytest.mark.parametrize("changes", [{}, {"window": 30}, {"chunk": 80}], ids=str)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("method", [name for name in SPECS if name != "rocketkv"])
def test_nothing_comes_back(
    make_trace: MakeTrace, rules: Rules, method: str, keep: str, changes: dict[str, int]
) -> None:
    layer = rules(heads=4, kv_heads=2, rotation=Rotation((1.0, 0.3)), **changes)
    trace = make_trace([layer, layer], [LENGTH])
    ks = [10, 20]
    for unit in load_units(trace.layer(0), 0, torch.device("cpu")):
        steps = held(spec_of(method, keep), unit, Protocol(prefix=END), ks)
        for b, k in enumerate(ks):
            for head in range(2):
                before = steps[0][b][head]
                for position, step in enumerate(steps, start=END):
                    now = step[b][head]
                    first = layer.first_visible(position)
                    old = {j for j in now if j < END}
                    # All that was left and is still seen, and all that came since.
                    assert old == {j for j in before if first <= j < END}
                    assert now - old == set(range(max(END, first), position + 1))
                    least = min(k, END - layer.first_visible(END))
                    if method not in ("adakv", "pyramidkv"):  # whose heads and layers differ
                        assert position > END or len(old) == least


@pytest.mark.parametrize("keep", KEEPS)
def test_what_rocketkv_leaves_out_is_not_even_kept(
    make_trace: MakeTrace, rules: Rules, keep: str
) -> None:
    trace = make_trace(rules(heads=4, kv_heads=2), [LENGTH])
    spec = spec_of("rocketkv", keep)
    for unit in load_units(trace.layer(0), 0, torch.device("cpu")):
        # A budget that has room for all attends what is left.
        everything = held(spec_of("rocketkv", ""), unit, Protocol(prefix=END), [LENGTH])[0][0][0]
        assert len(everything) == 15 + 1  # a quarter, and its own
        for step in held(spec, unit, Protocol(prefix=END), [4, 20]):
            for heads in step:
                for now in heads:
                    assert {j for j in now if j < END} <= everything
