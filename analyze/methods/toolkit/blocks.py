"""Blocks of consecutive keys or queries: the last may be shorter than the others."""

import torch
from torch import Tensor


def split(vectors: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """Vectors (..., vectors, channels) as blocks (..., blocks, size, channels), filled up."""
    missing = -vectors.shape[-2] % size
    padded = torch.nn.functional.pad(vectors, (0, 0, 0, missing), value=fill)
    return padded.view(*padded.shape[:-2], -1, size, padded.shape[-1])


def means(vectors: Tensor, size: int) -> Tensor:
    """Mean of each block (..., blocks, channels) of vectors (..., vectors, channels)."""
    blocks = split(vectors, size)
    first = torch.arange(0, vectors.shape[-2], size, device=vectors.device)
    counts = (vectors.shape[-2] - first).clamp(max=size)
    mean: Tensor = blocks.sum(dim=-2) / counts[:, None]
    return mean


def sums(values: Tensor, size: int) -> Tensor:
    """Sum of each block (..., blocks) of values (..., values)."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % size))
    return padded.view(*padded.shape[:-1], -1, size).sum(dim=-1)


def logs(masses: Tensor) -> Tensor:
    """log of attention masses, as low as it gets but finite where they vanish: what has next to
    none is attended before nothing is."""
    return masses.clamp(min=torch.finfo(masses.dtype).tiny).log()
