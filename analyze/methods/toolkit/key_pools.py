"""Pools: means of consecutive keys that overlap, which a query sees once all their keys are there,
and the attention to them within blocks of keys."""

import torch
from torch import Tensor

from retrace.analyze.units.attention import softcap, visible
from retrace.traces import LayerRules

NOTHING = -1e30
"""The logarithm of no attention: the least that sums of scores hold, and attended last."""


def means(keys: Tensor, size: int, stride: int) -> Tensor:
    """The mean of every `size` consecutive keys, `stride` apart, that are all there: keys
    (keys, channels) give pools (pools, channels)."""
    if len(keys) < size:
        return keys.new_zeros((0, keys.shape[1]))
    return keys.unfold(0, size, stride).mean(dim=-1)


def complete(keys: Tensor, size: int, stride: int) -> Tensor:
    """How many pools are complete among so many keys (any,)."""
    return (keys - size).div(stride, rounding_mode="floor").clamp(min=-1) + 1


def logits(
    queries: Tensor, pools: Tensor, positions: Tensor, rules: LayerRules, size: int, stride: int
) -> Tensor:
    """q.mean(K) of every pool that is complete at the query, and of which it sees a key: queries
    (group, queries, channels) and pools (pools, channels) give (group, queries, pools), -inf for
    other pools."""
    last = torch.arange(len(pools), device=pools.device) * stride + size - 1
    scores = softcap(queries @ pools.T, rules)
    return scores.masked_fill(~visible(positions, last, rules), -torch.inf)


def group_logs(logits: Tensor, log_totals: Tensor) -> Tensor:
    """log of the attention to each pool, summed over the group: logits (group, queries, pools) and
    the logarithm of what each head's is divided by (group, queries, 1) give (queries, pools).

    Logarithms, since far pools get less than a float32 holds, and have an order all the same.
    """
    return (logits - log_totals.masked_fill(log_totals.isneginf(), 0.0)).logsumexp(dim=0)


def in_blocks(logs: Tensor, blocks: int, block: int, size: int, stride: int) -> tuple[Tensor, ...]:
    """The pools that each of so many blocks of keys holds a key of: of logs (queries, pools) their
    own (queries, blocks, most), -inf where there are fewer, and the share (blocks, most) of the
    pool's keys that the block holds."""
    starts = torch.arange(blocks, device=logs.device)[:, None] * block
    first = (starts - size).div(stride, rounding_mode="floor") + 1
    ids = first + torch.arange(-(-(block + size) // stride), device=logs.device)
    ends = torch.minimum(ids * stride + size, starts + block)
    held = (ends - torch.maximum(ids * stride, starts)).clamp(min=0) / size
    held = held.masked_fill((ids < 0) | (ids >= logs.shape[1]), 0.0)
    # One more, so that there is one to point to.
    padded = torch.nn.functional.pad(logs, (0, 1), value=-torch.inf)
    found = padded[:, ids.clamp(0, logs.shape[1])]
    return found.masked_fill(held == 0, -torch.inf), held
