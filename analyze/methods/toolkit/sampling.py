"""Random samples of keys, without replacement, and what they say of all keys."""

import numpy as np
import torch
from torch import Tensor

from retrace.analyze.units import kernels


def smallest(numbers: Tensor, counts: Tensor) -> Tensor:
    """Which are the `counts` (group, queries) smallest of numbers (group, queries, keys) float32 in
    [0, inf], ties to the lower key: bool (group, queries, keys). An infinite number is never one.

    Of numbers drawn at random, those are a sample without replacement.
    """
    if kernels.usable(numbers):
        from retrace.analyze.methods.toolkit.kernels.draws import smallest

        return smallest(numbers.flatten(0, -2), counts.flatten()).view(numbers.shape)
    counts = counts[..., None]
    # NumPy sorts float32 many times faster than PyTorch does on a CPU.
    ordered = torch.from_numpy(np.sort(numbers.cpu().numpy(), axis=-1)).to(numbers.device)
    last = ordered.gather(-1, counts.long().clamp(1, numbers.shape[-1]) - 1)
    below, tied = numbers < last, (numbers == last) & numbers.isfinite() & (counts > 0)
    room = counts - below.sum(dim=-1, keepdim=True)
    if bool((tied.sum(dim=-1, keepdim=True) > room).any()):
        tied &= tied.cumsum(dim=-1) <= room
    return below | tied


def sampled_moments(
    logits: Tensor, largest: Tensor, sampled: Tensor, sure: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of weights exp(logit - largest) in float64: the mean of those sampled, the sum of squares
    about it, and the sum of those that are sure, each (group, queries) float64.

    Args:
        logits: (group, queries, keys) float32.
        largest: of the logits (group, queries).
        sampled: bool (group, queries, keys).
        sure: likewise.
    """
    if kernels.usable(logits):
        from retrace.analyze.methods.toolkit.kernels.draws import sampled_moments

        rows = (tensor.flatten(0, -2) for tensor in (logits, sampled, sure))
        flat, some, certain = rows
        found = sampled_moments(flat, largest.flatten(), some, certain)
        mean, squares, total = (part.view(largest.shape) for part in found)
        return mean, squares, total
    weights = torch.exp((logits - largest[..., None]).double())
    total = (weights * sure).sum(dim=-1)
    mean = (weights * sampled).sum(dim=-1) / sampled.sum(dim=-1).clamp(min=1)
    squares = weights.sub_(mean[..., None]).mul_(sampled).square_().sum(dim=-1)
    return mean, squares, total
