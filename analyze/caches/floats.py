"""Formats of floating-point numbers in few bits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from retrace.analyze.caches.formats import Format

LARGEST_E4M3 = 448.0
LARGEST_E2M1 = 6.0
BLOCK = 16
"""Channels of NVFP4 that share a scale."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of its numbers."""
TIES_DOWN, TIES_UP = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)
"""Halfway between two of them, where the even code is the smaller one and the larger one."""


@dataclass(frozen=True)
class FP8(Format):
    """FP8 E4M3 (OCP, arXiv:2209.05433) with the scale 1 for the whole cache, larger numbers held as
    448: what servers do where a checkpoint brings no scale (vLLM's k_scale and v_scale). A scale
    taken from all of a sequence would tell of tokens that are yet to come."""

    def rounded(self, vectors: Tensor) -> Tensor:
        """The nearest number of the format, ties to even."""
        return e4m3(vectors)

    def bytes(self, channels: int) -> float:
        """One for each channel."""
        return float(channels)

    def __str__(self) -> str:
        return "fp8"


@dataclass(frozen=True)
class NVFP4(Format):
    """FP4 E2M1 in blocks of 16 channels of a token, each with a scale in E4M3, max |x| / 6, under
    one float32 scale for the whole cache, which is 1 as for FP8: where no calibration brings one.

    Source: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv:2509.25149), section 2.
    """

    def rounded(self, vectors: Tensor) -> Tensor:
        """The nearest number times its block's scale, ties to even."""
        blocks = vectors.reshape(*vectors.shape[:-1], -1, BLOCK)
        scale = e4m3(blocks.abs().amax(dim=-1, keepdim=True) / LARGEST_E2M1)
        ratios = torch.where(scale == 0, 0.0, blocks / scale)
        return (e2m1(ratios) * scale).flatten(-2)

    def bytes(self, channels: int) -> float:
        """Half a byte for each channel, and a scale for each block."""
        return channels / 2 + channels / BLOCK

    def check(self, channels: int) -> None:
        """Refuse a part of a block."""
        self._check_multiple(channels, BLOCK)

    def __str__(self) -> str:
        return "nvfp4"


def e4m3(numbers: Tensor) -> Tensor:
    """Numbers as E4M3 gives them back, the largest for larger ones."""
    inside = numbers.clamp(-LARGEST_E4M3, LARGEST_E4M3)
    return inside.to(torch.float8_e4m3fn).to(numbers.dtype)


def e2m1(numbers: Tensor) -> Tensor:
    """Numbers as E2M1 gives them back, the largest for larger ones."""
    magnitudes = numbers.abs()
    codes = torch.zeros_like(numbers, dtype=torch.int64)
    for halfway in TIES_DOWN:
        codes += magnitudes > halfway
    for halfway in TIES_UP:
        codes += magnitudes >= halfway
    levels = torch.tensor(E2M1, device=numbers.device, dtype=numbers.dtype)
    return levels[codes] * numbers.sign()
