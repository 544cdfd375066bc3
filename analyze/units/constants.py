"""Small whole numbers as tensors, sent to a device once: each time would have it waited for."""

from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor


@lru_cache(maxsize=4096)
def constant(numbers: tuple[int, ...], device: torch.device) -> Int64[Tensor, "any"]:
    """These numbers on a device; not to be written to."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)
