"""Numbers in few bits."""

from torch import Tensor


def rounded(vectors: Tensor, bits: int) -> Tensor:
    """Vectors (..., channels) as `bits` bits a channel give them back: each is scaled so that its
    least and its greatest element are among the 2^bits levels, evenly spaced."""
    low, high = vectors.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    levels: Tensor = low + ((vectors - low) / step).round() * step
    return levels
