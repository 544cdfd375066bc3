"""Attention as a layer's rules define it: who sees whom, scores, probabilities."""

import torch
from torch import Tensor

from retrace.analyze.units import kernels
from retrace.traces import LayerRules

GATHER_COST = 8
"""How many times dearer a gathered key is than one of a whole matrix of scores."""
GATHERED = 1 << 27
"""Numbers of gathered keys held at once on a GPU without Triton."""


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


def unseen(positions: Tensor, keys: Tensor, rules: LayerRules) -> Tensor:
    """Which key positions (keys,) each query position (queries,) does not see: bool (queries,
    keys)."""
    if rules.window is None and rules.chunk is None:
        return keys > positions[:, None]
    return ~visible(positions, keys, rules)


def score(queries: Tensor, keys: Tensor, rules: LayerRules) -> Tensor:
    """softcap(scale * q.k), causal or not: queries (..., queries, channels) and
    keys (..., keys, channels) give (..., queries, keys), in the dtype of the input."""
    return softcap(torch.matmul(queries * rules.scale, keys.transpose(-1, -2)), rules)


def softcap(scores: Tensor, rules: LayerRules) -> Tensor:
    """The layer's smooth bound on scores, where it has one."""
    if rules.softcap is None:
        return scores
    return torch.tanh(scores / rules.softcap) * rules.softcap


def scores_at(queries: Tensor, keys: Tensor, ids: Tensor, rules: LayerRules) -> Tensor:
    """Scores (heads, queries, any) float64 of single keys: queries (heads, queries, channels) and
    keys (keys, channels) float32, ids (heads, queries, any) int64, -inf for the id -1."""
    if ids.device.type == "cpu":
        from retrace.analyze.units.compiled_scores import scores_at

        return scores_at(queries, keys, ids, rules.scale, rules.softcap or 0.0)
    if ids.shape[-1] * GATHER_COST >= len(keys):
        scores = score(queries.double(), keys.double(), rules).gather(-1, ids.clamp(min=0))
    elif kernels.usable(ids):
        from retrace.analyze.units.kernels.products import products

        scores = softcap(products(queries, keys, ids) * rules.scale, rules)
    else:
        step = max(1, GATHERED // max(1, ids[:, :1].numel() * keys.shape[1]))
        blocks = zip(torch.split(ids, step, dim=1), torch.split(queries, step, dim=1), strict=True)
        parts = [
            torch.matmul(keys[some.clamp(min=0)].double(), asked.double()[..., None]).squeeze(-1)
            for some, asked in blocks
        ]
        scores = softcap(torch.cat(parts, dim=1) * rules.scale, rules)
    return scores.masked_fill(ids < 0, -torch.inf)


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
    chosen: Tensor | None = None,
) -> Tensor:
    """Exact attention output (heads, queries, value channels) of the heads of one kv head.

    Args:
        queries: (heads, queries, channels).
        keys: (positions, channels).
        values: (positions, value channels).
        positions: position of each query (queries,).
        rules: the layer's rules.
        sinks: learned logit of each of these heads (heads,), where the layer has them.
        chosen: the only keys that each query attends to, int64 (queries, any), -1 where there are
            fewer; all that it sees by default.
    """
    key_positions = torch.arange(keys.shape[0], device=keys.device)
    scores = score(queries, keys, rules)
    seen = visible(positions, key_positions, rules)
    if chosen is not None:
        places = chosen.masked_fill(chosen < 0, len(keys))
        among = torch.zeros((len(positions), len(keys) + 1), dtype=torch.bool, device=keys.device)
        seen = seen & among.scatter(1, places, True)[:, :-1]
    scores = scores.masked_fill(~seen, -torch.inf)
    probabilities = torch.exp(scores - log_normalizer(scores, sinks)[..., None])
    return probabilities @ values
