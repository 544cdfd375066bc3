"""Random numbers that follow from what they are for, not from who asked before."""

import torch
from torch import Tensor

from retrace.analyze.units.unit import HeadGroup


def uniform(seed: int, group: HeadGroup, positions: Tensor, count: int) -> Tensor:
    """Uniform numbers in (0, 1) for the queries of a group (group, queries, count) float32, the
    same for a query whichever others it is answered with.

    A counter is hashed by the finalizer of SplitMix64 (Steele, Lea and Flood, 2014), for layer,
    sequence, head, position and place in turn, on the device of `positions` (queries,).
    """
    device = positions.device
    state = torch.full((1, 1, 1), seed, dtype=torch.int64, device=device)
    heads = torch.arange(group.heads.start, group.heads.stop, device=device)
    for part in (
        torch.tensor([group.layer], device=device)[:, None, None],
        torch.tensor([group.sequence], device=device)[:, None, None],
        heads[:, None, None],
        positions[None, :, None],
        torch.arange(count, device=device)[None, None],
    ):
        state = _hash(state + part)
    # The upper 24 bits, which float32 holds exactly, and half a step so that 0 is left out.
    return ((state >> 40 & 0xFFFFFF).float() + 0.5) / (1 << 24)


def _hash(state: Tensor) -> Tensor:
    state = state + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """A right shift that brings in zeros, which int64's own does not for negative numbers."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 of the same bits."""
    return number - (1 << 64) if number >= 1 << 63 else number
