"""Random numbers that follow from what they are for, not from who asked before."""

import torch
from torch import Tensor

from retrace.analyze.units import kernels
from retrace.analyze.units.constants import constant
from retrace.analyze.units.unit import HeadGroup

GAMMA = 0x9E3779B97F4A7C15
STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
ALL_BITS = (1 << 64) - 1


def uniform(
    seed: int, group: HeadGroup, positions: Tensor, count: int, heads: int | None = None
) -> Tensor:
    """Uniform numbers in (0, 1) for the queries of a group (group, queries, count) float32, the
    same for a query whichever others it is answered with; of its first `heads` alone, if given.

    A counter is hashed by the finalizer of SplitMix64 (Steele, Lea and Flood, 2014), for layer,
    sequence, head, position and place in turn, on the device of `positions` (queries,).
    """
    state = seed
    for part in (group.layer, group.sequence):
        state = _hash_number(state + part)
    numbers = range(group.heads.start, group.heads.stop)[:heads]
    starts = constant(
        tuple(_signed(_hash_number(state + head)) for head in numbers), positions.device
    )
    if kernels.usable(positions):
        from retrace.analyze.methods.toolkit.kernels.random_numbers import uniform

        return uniform(starts, positions, count)
    return plain_uniform(starts, positions, count)


def plain_uniform(starts: Tensor, positions: Tensor, count: int) -> Tensor:
    """The numbers that follow from a counter's state (group,) int64 for each head."""
    state = _hash(starts[:, None] + positions)
    state = _hash(state[..., None] + torch.arange(count, device=positions.device))
    # The upper 24 bits, which float32 holds exactly, and half a step so that 0 is left out.
    return ((state >> 40 & 0xFFFFFF).float() + 0.5) / (1 << 24)


def _hash(state: Tensor) -> Tensor:
    state = state + _signed(GAMMA)
    for shift, factor in STEPS:
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    return state ^ _shifted(state, LAST_SHIFT)


def _hash_number(state: int) -> int:
    """The same of one number, in 64 bits."""
    state = (state + GAMMA) & ALL_BITS
    for shift, factor in STEPS:
        state = (state ^ (state >> shift)) * factor & ALL_BITS
    return state ^ (state >> LAST_SHIFT)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """A right shift that brings in zeros, which int64's own does not for negative numbers."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 of the same bits."""
    return number - (1 << 64) if number >= 1 << 63 else number
