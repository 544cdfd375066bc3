"""Kernels on a GPU where there is one, otherwise in Triton's interpreter on small tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")

SHORT = torch.bfloat16 if GPU else torch.float16
"""The interpreter multiplies no bfloat16."""

from retrace.analyze.exact.kernels.inputs import Inputs  # noqa: E402
from retrace.analyze.units.kernels.tiles import Tiles  # noqa: E402


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(scope="session")
def small() -> Tiles:
    """Tiles of which small tensors have several."""
    return Tiles(queries=16, keys=32, warps=4, stages=2)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"group": 1},
    "one query": {"rows": [40]},
    "first query": {"rows": [0]},
    "some queries": {"rows": [0, 3, 31, 32, 63, 64, 90, 91, 119]},
    "window": {"window": 40},
    "narrow window": {"window": 3},
    "chunk": {"chunk": 50},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "odd channels": {"key_dim": 24, "value_dim": 5},
    "wide values": {"key_dim": 8, "value_dim": 48},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "everything": {
        "rows": list(range(5, 120, 3)),
        "window": 70,
        "chunk": 100,
        "softcap": 5.0,
        "sinks": True,
        "key_dim": 24,
        "value_dim": 40,
    },
}


@pytest.fixture(params=CASES, ids=list(CASES))
def inputs(request: pytest.FixtureRequest, device: torch.device) -> Inputs:
    """Every kind of block, one after another."""
    return make(device, **CASES[request.param])


@pytest.fixture
def make_inputs(device: torch.device) -> Callable[..., Inputs]:
    """A function that makes a block's inputs."""
    return lambda **changes: make(device, **changes)


def make(
    device: torch.device,
    *,
    group: int = 2,
    rows: list[int] | None = None,
    length: int = 120,
    key_dim: int = 16,
    value_dim: int = 16,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    dtype: torch.dtype = SHORT,
) -> Inputs:
    """Random inputs on a grid of quarters, so that products are exact and ties are frequent."""
    generator = torch.Generator().manual_seed(0)

    def grid(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul(4).round().div(4).to(device, dtype)

    positions = torch.arange(length) if rows is None else torch.tensor(rows)
    first = torch.zeros_like(positions)
    if window is not None:
        first = torch.maximum(first, positions - window + 1)
    if chunk is not None:
        first = torch.maximum(first, positions - positions % chunk)
    seen = int(positions[-1]) + 1
    return Inputs(
        grid(group, len(positions), key_dim),
        grid(seen, key_dim),
        grid(seen, value_dim),
        positions.int().to(device),
        first.int().to(device),
        key_dim**-0.5,
        softcap,
        torch.randn(group, generator=generator).to(device) if sinks else None,
    )
