"""Adamas: Manhattan distance of Hadamard-rotated vectors in two bits a channel."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import POOL, ScoreMethod
from retrace.analyze.methods.toolkit.hashing import hadamard, padded
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup

MOST_SIGNS = 1 << 10
"""Of a vector: with more of them distances are summed channel by channel."""


@dataclass(frozen=True, kw_only=True)
class Adamas(ScoreMethod):
    """Scores keys by the Manhattan distance of key and query, both rotated by a Hadamard matrix
    and with every channel in one of 2^`bits` buckets.

    Bounds of buckets are `step` apart around 0: -10, 0 and 10 of the rotation that is not
    normalised, as in the code, or with `bounds=deviation` in units of each vector's own root mean
    square, where later code takes one standard deviation over all keys, future ones included.
    The least distance over the group counts, as in the code. Channels are padded with zeros to a
    power of two. The code leaves the first two layers dense.
    """

    source: ClassVar[str] = "arXiv:2510.18413 (Adamas), section 3; FibonaccciYan/Adamas"

    bits: int = field(default=2, metadata={"help": "bits of a channel"})
    bounds: str = field(
        default="fixed",
        metadata={"help": "what bounds of buckets follow", "choices": ("fixed", "deviation")},
    )
    step: float | None = field(
        default=None, metadata={"help": "between bounds; 10 if fixed, else 1, if unset"}
    )
    pool: str = field(default="max", metadata=POOL)

    def build(self, past: Past) -> Any:
        """The layer's scale, and every key's buckets (keys, padded channels)."""
        return past.group.rules.scale, self._buckets(past.keys)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """Less the distance of buckets."""
        scale, buckets = state
        asked, held = self._buckets(queries / scale), buckets[: int(positions[-1]) + 1]
        bounds = (1 << self.bits) - 1
        if bounds * held.shape[-1] > MOST_SIGNS:
            return -torch.cdist(asked, held[None], p=1)
        # Of each channel and bound, whether the bucket is above: a distance is the number of signs
        # that differ. Sums of so few halves are exact in float16, which a GPU multiplies fastest.
        dtype = torch.float16 if held.is_cuda else torch.float32
        ours, theirs = (_above(vectors, bounds, dtype) for vectors in (asked, held))
        ones = theirs.new_ones(len(theirs), 1)
        less = ours.new_full((*ours.shape[:-1], 1), -ours.shape[-1])
        return (torch.cat([ours, less], -1) / 2 @ torch.cat([theirs, ones], -1).T).float()

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Every key's buckets."""
        return keys * padded(group.rules.key_dim) * self.bits / 8

    def _buckets(self, vectors: Tensor) -> Tensor:
        """The bucket, from 0, of each channel after rotation (..., padded channels) float32."""
        rotated = hadamard(vectors)
        fixed = self.bounds == "fixed"
        step = (10.0 if fixed else 1.0) if self.step is None else self.step
        if fixed:
            rotated = rotated * rotated.shape[-1] ** 0.5
        else:
            rotated = rotated / rotated.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)
        half = 1 << (self.bits - 1)
        # A channel on a bound is below it, as torch.bucketize has it.
        return (torch.ceil(rotated / step) - 1).clamp(-half, half - 1) + half


def _above(buckets: Tensor, bounds: int, dtype: torch.dtype) -> Tensor:
    """1 for each bound between buckets (..., channels) that one is above, else -1: (..., channels x
    bounds)."""
    bound = torch.arange(1, bounds + 1, device=buckets.device)
    return ((buckets[..., None] >= bound).to(dtype) * 2 - 1).flatten(-2)
