"""TurboQuant: a random rotation makes all coordinates alike, and one code book serves them."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrace.analyze.caches.formats import HALF_BYTES, Format, half
from retrace.traces import RetraceError

Doubles = NDArray[np.float64]

LEAST_CHANNELS = 3
"""Fewer have a density without a bound."""
REACH = 12.0
"""Standard deviations of a coordinate beyond which there is nothing."""
GRID = 1 << 17
"""Points at which its density is known."""
SWEEPS = 2000
ROTATION_SEED, SKETCH_SEED = 1, 2


@dataclass(frozen=True)
class TurboQuant(Format):
    """A vector's norm in float16, and `bits` for each channel of its direction: the nearest levels
    of its coordinates after a random rotation, the same rotation for all vectors.

    The levels are Lloyd and Max's for a coordinate of a random direction. With `unbiased`, they
    have a bit less, and the bit is the sign of a random projection of what is left (QJL,
    arXiv:2406.03482), whose norm is held in float16 as well: inner products with any query are then
    right on average over projections. Source: arXiv:2504.19874, algorithms 1 and 2.
    """

    bits: int
    unbiased: bool = False

    def rounded(self, vectors: Tensor) -> Tensor:
        """Levels, turned back and scaled by the norm."""
        norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        directions = torch.where(norms == 0, 0.0, vectors / norms)
        levels = self.bits - 1 if self.unbiased else self.bits
        found = nearest_levels(directions, levels)
        if self.unbiased:
            found = found + signs_of(directions - found)
        return half(norms) * found

    def bytes(self, channels: int) -> float:
        """The codes and one norm, or two."""
        return channels * self.bits / 8 + (2 if self.unbiased else 1) * HALF_BYTES

    def check(self, channels: int) -> None:
        """Refuse directions in a plane."""
        if channels < LEAST_CHANNELS:
            raise RetraceError(f"{self} needs {LEAST_CHANNELS} channels, and there are {channels}.")

    def __str__(self) -> str:
        return f"turboquant{'-prod' if self.unbiased else ''}:{self.bits}"


def nearest_levels(directions: Tensor, bits: int) -> Tensor:
    """Unit vectors (..., channels) as `bits` bits a channel give them back; zeros for none."""
    if not bits:
        return torch.zeros_like(directions)
    channels = directions.shape[-1]
    turn = _rotation(channels).to(directions)
    levels = torch.from_numpy(code_book(channels, bits)).to(directions)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize((directions @ turn.T).contiguous(), between)
    return levels[codes] @ turn


def signs_of(rest: Tensor) -> Tensor:
    """What one bit a channel gives back of vectors (..., channels): signs of random projections."""
    channels = rest.shape[-1]
    sketch = _normal(channels, SKETCH_SEED).to(rest)
    norms = half(torch.linalg.vector_norm(rest, dim=-1, keepdim=True))
    signs = torch.where(rest @ sketch.T < 0, -1.0, 1.0)
    return math.sqrt(math.pi / 2) / channels * norms * (signs @ sketch)


@cache
def code_book(channels: int, bits: int) -> Doubles:
    """The 2^bits levels (levels,) of least mean squared error for a coordinate of a random unit
    vector, ascending (Lloyd, 1982; Max, 1960).

    Its density is proportional to (1 - x^2)^((channels - 3) / 2): lemma 1 of arXiv:2504.19874,
    which nears a normal one of variance 1 / channels.
    """
    reach = min(1.0, REACH / math.sqrt(channels))
    edges = np.linspace(-reach, reach, GRID + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    density = (1 - middle**2) ** ((channels - 3) / 2)
    mass = np.concatenate([[0.0], density.cumsum()])
    moment = np.concatenate([[0.0], (density * middle).cumsum()])
    # As dense as the cube root of the density, which is best where levels are many.
    share = np.concatenate([[0.0], np.cbrt(density).cumsum()])
    wanted = (np.arange(2**bits) + 0.5) / 2**bits
    levels: Doubles = np.interp(wanted, share / share[-1], edges)
    for _ in range(SWEEPS):
        between = np.concatenate([[-reach], (levels[1:] + levels[:-1]) / 2, [reach]])
        held = np.diff(np.interp(between, edges, mass))
        found = np.diff(np.interp(between, edges, moment)) / held
        found = (found - found[::-1]) / 2  # as symmetric as the density
        moved = float(np.abs(found - levels).max())
        levels = found
        if moved < 1e-12:
            break
    return levels


@cache
def _normal(channels: int, seed: int) -> Tensor:
    """Normal numbers (channels, channels) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, channels, generator=generator, dtype=torch.float64)


@cache
def _rotation(channels: int) -> Tensor:
    """A random orthogonal matrix (channels, channels) float64, each as likely as any other."""
    basis, triangle = torch.linalg.qr(_normal(channels, ROTATION_SEED))
    turn: Tensor = basis * triangle.diagonal().sign()
    return turn
