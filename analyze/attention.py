"""Attention as a layer's rules define it: who sees whom, scores, probabilities."""

import torch
from torch import Tensor

from retrace.traces import LayerRules


def first_visible(positions: Tensor, rules: LayerRules) -> Tensor:
    """The first key that each query sees (queries,), for query positions (queries,)."""
    first = torch.zeros_like(positions)
    if rules.window is not None:
        first = torch.maximum(first, positions - rules.window + 1)
    if rules.chunk is not None:
        first = torch.maximum(first, positions - positions % rules.chunk)
    return first


def visible(positions: Tensor, keys: Tensor, rules: LayerRules) -> Tensor:
    """Which key positions (keys,) each query position (queries,) sees: bool (queries, keys)."""
    first = first_visible(positions, rules)
    return (keys <= positions[:, None]) & (keys >= first[:, None])


def score(queries: Tensor, keys: Tensor, rules: LayerRules) -> Tensor:
    """softcap(scale * q.k), causal or not: queries (..., queries, channels) and
    keys (..., keys, channels) give (..., queries, keys), in the dtype of the input."""
    return softcap(torch.matmul(queries * rules.scale, keys.transpose(-1, -2)), rules)


def softcap(scores: Tensor, rules: LayerRules) -> Tensor:
    """The layer's smooth bound on scores, where it has one."""
    if rules.softcap is None:
        return scores
    return torch.tanh(scores / rules.softcap) * rules.softcap


def log_normalizer(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """log of the softmax's denominator (heads, queries) for masked scores (heads, queries, keys).

    `sinks` (heads,) is the layer's learned logit per head, which takes part in it.
    """
    total = torch.logsumexp(scores, dim=-1)
    return total if sinks is None else torch.logaddexp(total, sinks[:, None])


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    rules: LayerRules,
    sinks: Tensor | None = None,
) -> Tensor:
    """Exact attention output (heads, queries, value channels) of the heads of one kv head.

    Args:
        queries: (heads, queries, channels).
        keys: (positions, channels).
        values: (positions, value channels).
        positions: position of each query (queries,).
        rules: the layer's rules.
        sinks: learned logit of each of these heads (heads,), where the layer has them.
    """
    key_positions = torch.arange(keys.shape[0], device=keys.device)
    scores = score(queries, keys, rules)
    scores = scores.masked_fill(~visible(positions, key_positions, rules), -torch.inf)
    probabilities = torch.exp(scores - log_normalizer(scores, sinks)[..., None])
    return probabilities @ values
