"""A fitted state in a layer with a window or chunks is one of what its queries see."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from retrace.analyze import parse_spec
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import States
from retrace.analyze.units.protocol import Protocol
from retrace.analyze.units.unit import Block, Unit, load_units
from retrace.traces import Rotation, Trace

MakeTrace = Callable[..., Trace]
LENGTH, LAST = 420, 390
SPECS = [
    "clusterkv:size=8,keep=sink:4",
    "retroinfer:size=8,recent=4",
    "squeezed:clusters=0.2,observed=8",
    "infllm:block=8,representatives=2,keep=sink:4+recent:4",
    "shadowkv:chunk=4,outliers=2,local=1,rank=4",
    "rocketkv:prompt=0.5,window=8,kernel=3",
    "flat",
]


@pytest.mark.parametrize("layer", [{"window": 64}, {"chunk": 80}], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_it_costs_what_that_of_the_visible_keys_alone_does(
    make_trace: MakeTrace, rules: Any, spec: str, layer: dict[str, int]
) -> None:
    """Of the last query, and of a sequence that begins with what the state's first query sees."""
    method = parse_spec(spec).method
    if method.extra is not None:
        pytest.importorskip(method.extra, reason=f"{method.extra} is not installed")
    rotation = Rotation((1.0, 0.3, 0.1, 0.03))
    trace = make_trace(rules(heads=2, kv_heads=1, rotation=rotation, **layer), [LENGTH])
    [unit] = load_units(trace.layer(0), 0, torch.device("cpu"))
    built = Protocol.parse("all:32").built_at(LAST, LENGTH)

    def read(unit: Unit, row: int, protocol: str) -> float:
        block = Block(unit, slice(row, row + 1))
        [served] = States(method, unit, Protocol.parse(protocol)).serve(block)
        [found] = select(method, served, block, [8])
        assert served.state is not None
        return float(torch.as_tensor(found.aux_bytes).expand(1))

    first = unit.group.rules.first_visible(built)
    alone = read(unit.since(first), LAST, f"prefix:{built - first}")
    whole = read(unit, LAST, "all:32")
    # Sinks that are gone are not kept apart, and pages begin elsewhere; of all earlier keys it
    # would be several times as much.
    assert 0 < whole <= 1.5 * alone
