"""Formats of whole numbers, evenly spaced."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.caches.formats import HALF_BYTES, Format, half

BLOCK = 32
"""Channels of a token, or tokens of a channel, that share a scale."""
RESIDUAL = 128
"""The newest tokens that KIVI holds in full."""


@dataclass(frozen=True)
class Blocks(Format):
    """Each block of 32 channels of a token by itself, with one scale d in float16 and no offset: 8
    bits as q8_0 (d = max |x| / 127), 4 bits as q4_0 (d = m / -8, m being the number of largest
    magnitude, so that m is held exactly but for d's rounding).

    Codes are found by d in float32, as there. Source: ggml, `quantize_row_q8_0_ref` and
    `quantize_row_q4_0_ref` of ggml-quants.c.
    """

    bits: int

    def rounded(self, vectors: Tensor) -> Tensor:
        """Code times scale."""
        blocks = vectors.reshape(*vectors.shape[:-1], -1, BLOCK)
        magnitudes = blocks.abs()
        largest, place = magnitudes.max(dim=-1, keepdim=True)
        if self.bits == 8:
            scale = largest / 127
            ratios = blocks * _inverse(scale)
            # Halves away from zero, as roundf does.
            codes = (ratios.abs() + 0.5).floor() * ratios.sign()
        else:
            scale = blocks.gather(-1, place) / -8
            codes = (blocks * _inverse(scale) + 8.5).floor().clamp(max=15) - 8
        found: Tensor = (codes * half(scale)).flatten(-2)
        return found

    def bytes(self, channels: int) -> float:
        """The codes, and a scale for each block."""
        return channels * self.bits / 8 + channels / BLOCK * HALF_BYTES

    def check(self, channels: int) -> None:
        """Refuse a part of a block."""
        self._check_multiple(channels, BLOCK)

    def __str__(self) -> str:
        return f"int{self.bits}:{BLOCK}"


@dataclass(frozen=True)
class ByToken(Format):
    """All channels of a token together, with a scale and an offset in float16: the least number is
    code 0, the greatest the last one."""

    bits: int

    def rounded(self, vectors: Tensor) -> Tensor:
        """Offset and code times scale."""
        return evenly(vectors, self.bits)

    def bytes(self, channels: int) -> float:
        """The codes, a scale and an offset."""
        return channels * self.bits / 8 + 2 * HALF_BYTES

    def __str__(self) -> str:
        return f"int{self.bits}:token"


@dataclass(frozen=True)
class ByChannel(Format):
    """32 consecutive tokens of each channel together, with a scale and an offset in float16, as
    soon as the next token comes after the last of them."""

    bits: int
    step: ClassVar[int | None] = BLOCK

    def rounded(self, vectors: Tensor) -> Tensor:
        """Offset and code times scale, of whole groups."""
        whole = vectors[: len(vectors) // BLOCK * BLOCK]
        groups = whole.T.reshape(vectors.shape[-1], -1, BLOCK)
        return evenly(groups, self.bits).flatten(-2).T.contiguous()

    def bytes(self, channels: int) -> float:
        """The codes, and a share of a scale and an offset for each channel."""
        return channels * self.bits / 8 + channels * 2 * HALF_BYTES / BLOCK

    def first_full(self, position: Tensor) -> Tensor:
        """The first of the group, or of the `step` tokens, that the query's own is in."""
        assert self.step is not None
        return position - position % self.step

    def __str__(self) -> str:
        return f"int{self.bits}:channel"


@dataclass(frozen=True)
class KIVIKeys(ByChannel):
    """The same, four groups of tokens at once: the newest keys are in full until there are 128."""

    step: ClassVar[int | None] = RESIDUAL

    def __str__(self) -> str:
        return f"kivi:{self.bits}"


@dataclass(frozen=True)
class KIVIValues(Format):
    """Each 32 channels of a token together, the last maybe fewer, with a scale and an offset in
    float16, once the token is more than 128 tokens back.

    States of methods see it as the last query at a multiple of 128 did.
    """

    bits: int
    step: ClassVar[int | None] = RESIDUAL
    slides: ClassVar[bool] = True

    def rounded(self, vectors: Tensor) -> Tensor:
        """Offset and code times scale."""
        parts = [evenly(part, self.bits) for part in torch.split(vectors, BLOCK, dim=-1)]
        return torch.cat(parts, dim=-1)

    def bytes(self, channels: int) -> float:
        """The codes, a scale and an offset for every 32 of them."""
        return channels * self.bits / 8 + -(-channels // BLOCK) * 2 * HALF_BYTES

    def first_full(self, position: Tensor) -> Tensor:
        """128 tokens before the query's own."""
        return (position - RESIDUAL).clamp(min=0)

    def __str__(self) -> str:
        return f"kivi:{self.bits}"


def evenly(groups: Tensor, bits: int) -> Tensor:
    """Numbers (..., any) as 2^bits evenly spaced levels give them back, from the least to the
    greatest of each group, both as float16 holds the offset and the scale."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale, offset = half((high - low) / (2**bits - 1)), half(low)
    codes = ((groups - offset) * _inverse(scale)).round().clamp(0, 2**bits - 1)
    levels: Tensor = offset + codes * scale
    return levels


def _inverse(scale: Tensor) -> Tensor:
    """One over a scale; 0 where it is 0."""
    return torch.where(scale == 0, 0.0, 1 / scale)
