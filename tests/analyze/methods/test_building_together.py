"""States that are made together are those that each past gives alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retrace.analyze import Past, parse_spec
from retrace.analyze.methods.toolkit.kmeans import Compare, by_distance, in_common_steps
from retrace.analyze.units.unit import load_units
from retrace.traces import LayerRules, Trace

ENDS = (16, 32, 64, 90)
SPECS = (
    "clusterkv:size=6",
    "infllm:block=8,representatives=3,local=20",
    "pqcache:parts=3,bits=3",
    "retrieval-attention:sink=3,near=6,links=5",
    "retroinfer:size=6,segment=40,recent=8",
    "squeezed:clusters=0.2,observed=20",
    "squeezed:clusters=0.2,observed=20,threshold=0.01",
)


def parts(state: Any) -> Iterator[Any]:
    """Tensors and arrays of a state, in order."""
    if isinstance(state, Tensor | np.ndarray):
        yield state
    elif isinstance(state, dict):
        yield from parts(list(state.values()))
    elif isinstance(state, list | tuple):
        for part in state:
            yield from parts(part)
    elif is_dataclass(state) and not isinstance(state, Past):
        yield from parts([getattr(state, f.name) for f in fields(state)])


def of_each(
    sets: Sequence[Tensor], counts: Sequence[int], iterations: int, compare: Compare = by_distance
) -> list[Any]:
    """`kmeans_of_each`, as on a GPU."""
    counts = [min(count, own.shape[-2]) for own, count in zip(sets, counts, strict=True)]
    return in_common_steps(sets, counts, iterations, compare)


@pytest.mark.parametrize("as_on_gpu", [False, True])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("spec", SPECS)
def test_states_of_several_pasts(
    make_trace: Callable[..., Trace],
    rules: Callable[..., LayerRules],
    monkeypatch: pytest.MonkeyPatch,
    spec: str,
    window: int | None,
    as_on_gpu: bool,
) -> None:
    layer = make_trace(rules(heads=4, kv_heads=2, window=window), [90]).layer(0)
    units = [*load_units(layer, 0, torch.device("cpu"))]
    method = parse_spec(spec).method
    pasts = [Past(unit, 0, end) for unit in units for end in ENDS]
    alone = [method.build(past) for past in pasts]
    if as_on_gpu:
        monkeypatch.setattr(f"{type(method).__module__}.kmeans_of_each", of_each, raising=False)
    for own, state in zip(alone, method.build_each(pasts), strict=True):
        for mine, other in zip(parts(own), parts(state), strict=True):
            torch.testing.assert_close(torch.as_tensor(other), torch.as_tensor(mine))
