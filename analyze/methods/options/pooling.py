"""How query heads agree on one selection."""

from collections.abc import Callable

import torch
from torch import Tensor


def _softmax(scores: Tensor) -> Tensor:
    """0 for a head that may attend nothing, which has no softmax."""
    return torch.softmax(scores, dim=-1).nan_to_num_(0.0)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda scores: scores,
    "sum": lambda scores: scores.sum(dim=0, keepdim=True),
    "mean": lambda scores: scores.mean(dim=0, keepdim=True),
    "max": lambda scores: scores.amax(dim=0, keepdim=True),
    "sum-softmax": lambda scores: _softmax(scores).sum(dim=0, keepdim=True),
    "max-softmax": lambda scores: _softmax(scores).amax(dim=0, keepdim=True),
}
"""Rules by name: masked scores (heads, queries, units) to (heads or 1, queries, units).

A raw sum is led by the head whose scores are largest; pooling after the softmax gives every head
the same weight.
"""

MEAN_QUERY = "mean-query"
"""Scores once, with the mean of the group's queries, instead of pooling scores."""

LAYER = "layer-"
"""Before a rule's name: over all heads of the layer, not only those of one group."""

RULES = (*POOLINGS, MEAN_QUERY, *(LAYER + name for name in POOLINGS if name != "none"))
"""Every rule that a method can name."""


def pool(rule: str, scores: Tensor) -> Tensor:
    """One ranking (heads or 1, queries, units) of masked scores (heads, queries, units), -inf
    where no head may attend a unit."""
    if rule == MEAN_QUERY:
        return scores
    pooled = POOLINGS[rule.removeprefix(LAYER)](scores)
    if rule.endswith("softmax"):
        # After a softmax, what is hidden holds 0, which is not the least.
        pooled = pooled.masked_fill(scores.isneginf().all(dim=0), -torch.inf)
    return pooled
