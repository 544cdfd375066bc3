"""Numbers in few bits."""

import torch
from torch import Tensor

FP8_LARGEST = 448.0


def rounded(vectors: Tensor, bits: int) -> Tensor:
    """Vectors (..., channels) as `bits` bits a channel give them back: each is scaled so that its
    least and its greatest element are among the 2^bits levels, evenly spaced."""
    low, high = vectors.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    levels: Tensor = low + ((vectors - low) / step).round() * step
    return levels


def fp8(vectors: Tensor) -> Tensor:
    """Vectors (..., channels) as FP8 (E4M3) gives them back, each scaled so that its largest
    element is the largest number of the format."""
    scale = vectors.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / FP8_LARGEST
    levels: Tensor = (vectors / scale).to(torch.float8_e4m3fn).to(vectors.dtype) * scale
    return levels


def rounded_in_groups(vectors: Tensor, bits: int, size: int) -> Tensor:
    """The same with a scale and an offset for every `size` channels; the last may be fewer."""
    count = vectors.shape[-1] // size
    whole, rest = vectors[..., : count * size], vectors[..., count * size :]
    parts = [rounded(whole.reshape(*whole.shape[:-1], count, size), bits).flatten(-2)]
    if rest.shape[-1]:
        parts.append(rounded(rest, bits))
    return torch.cat(parts, dim=-1)
