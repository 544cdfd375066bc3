"""What of dropped keys and values is folded into those that are kept."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrace.analyze.methods.options.merge import MERGED, SEED
from retrace.analyze.methods.toolkit.random_numbers import uniform
from retrace.analyze.metrics.attention_output import attention_output
from retrace.analyze.units.past import Past
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block


@dataclass(frozen=True)
class Held:
    """What a cache holds of the keys that an eviction kept, by ascending position."""

    keys: Tensor
    """(kept, channels)"""
    values: Tensor
    """(kept, value channels)"""
    memory: Tensor
    """What the rule goes by at the next eviction."""


def d2o(past: Past, kept: Tensor, before: Tensor | None) -> Held:
    """Dropped keys and values, times a cosine, averaged into the kept key of largest cosine with
    it, where that reaches a threshold: the mean of such cosines, half of it that of evictions
    before. `before` is the last threshold ()."""
    keys, values, dropped = past.keys[kept], past.values[kept], _others(kept, len(past.keys))
    if not len(dropped):
        return Held(keys, values, keys.new_full((), torch.nan) if before is None else before)
    directions = torch.nn.functional.normalize(past.keys, dim=-1)
    alike, nearest = (directions[dropped] @ directions[kept].T).max(dim=-1)
    threshold = alike.mean()
    if before is not None and not bool(before.isnan()):
        threshold = (before + threshold) / 2
    merges = alike >= threshold
    dropped, nearest, alike = dropped[merges], nearest[merges], alike[merges][:, None]
    count = torch.ones(len(kept), 1, device=keys.device)
    count = count.index_add(0, nearest, torch.ones_like(alike))
    return Held(
        keys.index_add(0, nearest, alike * past.keys[dropped]) / count,
        values.index_add(0, nearest, alike * past.values[dropped]) / count,
        threshold,
    )


def cam(past: Past, kept: Tensor, before: Tensor | None) -> Held:
    """Dropped values, shared out evenly among the next kept ones, by chance: as often as the
    attention that the key has received comes to the mean of theirs. `before` is the attention that
    the first keys had received (keys,)."""
    values, dropped = past.values[kept], _others(kept, len(past.keys))
    received = past.attention_received().sum(dim=0)
    if before is not None:
        received[: len(before)] += before
    following = torch.searchsorted(kept, dropped)
    ends = (following + MERGED).clamp(max=len(kept))
    count = ends - following
    sums = torch.nn.functional.pad(received[kept].double().cumsum(dim=0), (1, 0))
    mean = (sums[ends] - sums[following]) / count
    chance = (received[dropped] / mean).nan_to_num(nan=0.0).clamp(0, 1)
    positions = past.in_sequence(dropped)
    merges = (uniform(SEED, past.group, positions, 1, heads=1)[0, :, 0] < chance) & (count > 0)
    share = past.values[dropped] / count.clamp(min=1)[:, None]
    for step in range(MERGED):
        own = merges & (step < count)
        values = values.index_add(0, following[own] + step, share[own])
    return Held(past.keys[kept], values, received[kept])


RULES: dict[str, Callable[[Past, Tensor, Tensor | None], Held]] = {"d2o": d2o, "cam": cam}
"""By name: of what is judged, the places of what is kept, ascending, and what the eviction before
went by."""


def _others(kept: Tensor, count: int) -> Tensor:
    """Places below `count` that are not among some, ascending."""
    dropped = torch.ones(count, dtype=torch.bool, device=kept.device)
    dropped[kept] = False
    return dropped.nonzero()[:, 0]


def merged_output(selection: Selection, block: Block, held: Held, kept: Tensor, end: int) -> Tensor:
    """The output (1, group, queries, value channels) over what the cache holds: merged keys and
    values at the `kept` positions (keys,), ascending, and from `end` on the sequence's own."""
    unit, ids = block.unit, selection.ids
    places = torch.where(ids < end, torch.searchsorted(kept, ids), ids - end + len(kept))
    cached = replace(
        unit,
        keys=torch.cat([held.keys, unit.keys[end : block.end]]),
        values=torch.cat([held.values, unit.values[end : block.end]]),
    )
    found = replace(selection, ids=places.masked_fill(ids < 0, -1))
    return attention_output(block.of(cached), found, [0])
