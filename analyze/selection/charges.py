"""What finding keys reads, as a method counts it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retrace.analyze.methods.base import (
    Method,
)
from retrace.analyze.methods.hooks import calling
from retrace.analyze.units.selection import where
from retrace.analyze.units.unit import Block
from retrace.traces import RetraceError

COUNTED = "bytes are counted, from 0 on."


class CostError(RetraceError):
    """A method counts its bytes in numbers that none can be."""


def aux_bytes(method: Method, answered: Sequence[tuple[Any, Block]], block: Block) -> Tensor:
    """Bytes of the state read per query of the group (queries,), of a block's queries that one
    state after another answers: each with the block of its own."""
    read = torch.cat([_read(method, state, own) for state, own in answered])
    if bool((~read.isfinite() | (read < 0)).any()):
        row = int((~read.isfinite() | (read < 0)).nonzero()[0])
        raise CostError(f"aux_bytes() gave {float(read[row])} at {where(block, 0, row)}: {COUNTED}")
    each = float(method.attended_bytes(block.unit.group))
    if not 0 <= each < math.inf:
        raise CostError(f"attended_bytes() gave {each}: {COUNTED}")
    return read


def _read(method: Method, state: Any, block: Block) -> Tensor:
    """The same of what one state answers, unchecked."""
    if state is None:
        return torch.zeros_like(block.visible_count)
    with calling("aux_bytes()", lambda: where(block)):
        positions, seen = block.positions.clone(), block.visible_count.clone()
        read = method.aux_bytes_at(state, positions, seen, block.unit.group)
        if isinstance(read, int | float):  # which no copy has to bring to a GPU
            return torch.full((len(block.positions),), read, device=block.positions.device)
        read = torch.as_tensor(read, device=block.positions.device)
        return read.expand(len(block.positions)).clone()
