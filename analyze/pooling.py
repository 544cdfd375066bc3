"""How the query heads of one kv head agree on one selection."""

from collections.abc import Callable

import torch
from torch import Tensor

POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda scores: scores,
    "sum": lambda scores: scores.sum(dim=0, keepdim=True),
    "mean": lambda scores: scores.mean(dim=0, keepdim=True),
    "max": lambda scores: scores.amax(dim=0, keepdim=True),
    "sum-softmax": lambda scores: torch.softmax(scores, dim=-1).sum(dim=0, keepdim=True),
    "max-softmax": lambda scores: torch.softmax(scores, dim=-1).amax(dim=0, keepdim=True),
}
"""Rules by name: masked scores (group, queries, units) to (group or 1, queries, units).

A unit that a query does not see holds -inf before; after a softmax it holds 0 and must be masked
anew. `none` lets each head select for itself. A raw sum is led by the head whose scores are
largest; pooling after the softmax gives every head the same weight.
"""

MEAN_QUERY = "mean-query"
"""Scores once, with the mean of the group's queries, instead of pooling scores."""
