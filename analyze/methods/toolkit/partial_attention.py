"""Parts that attention outputs are put together from, in a numerically safe way."""

from dataclasses import dataclass

import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.units import kernels
from retrace.analyze.units.attention import softcap, unseen
from retrace.analyze.units.past import Past
from retrace.traces import LayerRules

ABOVE_MERIT = 2.0**100
"""What a position is multiplied by to stand before all that is ranked by merit."""


@dataclass(frozen=True)
class PartialAttention:
    """Attention over some keys (or clusters): its output and the weight of it among others."""

    output: Tensor
    """(group, queries, value channels); zeros where there are no keys."""
    log_weight: Tensor
    """log of the sum of exp(logit) (group, queries); -inf where there are no keys."""


def logits_at(queries: Tensor, keys: Tensor, ids: Tensor, rules: LayerRules) -> Tensor:
    """Exact logits (group, queries, any) of scaled queries (group, queries, channels) for key ids
    of that shape among keys (keys, channels); -inf for the id -1."""
    dots = torch.matmul(keys[ids.clamp(min=0)], queries[..., None]).squeeze(-1)
    return softcap(dots, rules).masked_fill(ids < 0, -torch.inf)


def visible_logits(
    past: Past, queries: Tensor, positions: Tensor, keys: Tensor | None = None
) -> Tensor:
    """Exact logits (group, queries, keys) of scaled queries (group, queries, channels) at positions
    (queries,) for all keys up to the last of them; -inf where a query does not see a key. With
    `keys` (keys, channels), such as rounded ones, they stand for the past's own."""
    rules, end = past.group.rules, int(positions[-1]) + 1
    keys = past.keys if keys is None else keys
    logits = softcap(queries @ keys[:end].T, rules)
    places = torch.arange(end, device=positions.device)
    return logits.masked_fill_(unseen(positions, places, rules), -torch.inf)


def best_only(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Logits (group, queries, keys) with -inf for all but the k largest of each query, and the ids
    (group, queries, k or all) of those, best first, -1 where there are fewer."""
    ids = top(logits, min(k, logits.shape[-1]))[1]
    return logits.masked_fill(~marked(ids, logits.shape[-1]), -torch.inf), ids


def attended_ids(
    attended: Tensor,
    merit: Tensor,
    kept: Tensor | None = None,
    sink: int = 0,
    ordered: int | None = None,
) -> Tensor:
    """Ids (group, queries, any) int64 of the keys attended, in the order of the method: first those
    that it keeps whatever it finds, sinks and then the newest first; then by merit. -1 where there
    are fewer.

    Args:
        attended: bool (group, queries, keys).
        merit: what the method ranks keys by, less than 2^100, the same for those of a unit, which
            then come in ascending position: (group, queries, keys), or what expands to it.
        kept: bool, likewise; none if None.
        sink: keys before this position are sinks.
        ordered: how many come in that order, such as the k that recall looks at; the others follow
            in ascending position. All if None.
    """
    count = attended.shape[-1]
    ranking = merit
    if kept is not None:
        keys = torch.arange(1.0, count + 1.0, device=attended.device)
        newest = torch.where(keys <= sink, 2 * count + 2 - keys, keys)
        # Above any merit; a power of 2 leaves all positions apart.
        ranking = torch.where(kept, ABOVE_MERIT * newest, ranking)
    ranking = torch.where(attended, ranking, -torch.inf).to(torch.float32)
    if ordered is None:
        return top(ranking, _most(attended))[1]
    ids = top(ranking, min(ordered, count))[1]
    listed = torch.where(ids < 0, ids[..., :1], ids).clamp(min=0)
    return appended(ids, attended.scatter(-1, listed, False))


def appended(ids: Tensor, marks: Tensor) -> Tensor:
    """Ids (group, queries, any) int64, -1 only at the end, and after them those of the keys marked,
    bool (group, queries, keys), ascending: -1 where there are fewer."""
    starts = (ids >= 0).sum(dim=-1)
    width = max(1, int((starts + marks.sum(dim=-1)).max()))
    lists = ids.new_full((*ids.shape[:-1], width), -1)
    lists[..., : ids.shape[-1]] = ids[..., :width]
    rows, flat, first = lists.view(-1, width), marks.flatten(0, -2), starts.flatten()
    if kernels.usable(marks):
        from retrace.analyze.methods.toolkit.kernels.lists import append_marked

        append_marked(rows, first, flat)
        return lists
    row, key = flat.nonzero(as_tuple=True)
    before = torch.nn.functional.pad(flat.sum(dim=-1).cumsum(dim=0), (1, 0))
    place = torch.arange(len(row), device=row.device) - before[row] + first[row]
    rows[row, place] = key
    return lists


def _most(marks: Tensor) -> int:
    return max(1, int(marks.sum(dim=-1).max()))


def marked(ids: Tensor, count: int) -> Tensor:
    """Which of `count` keys or pages are among ids (..., any): bool (..., count). The id -1 marks
    none."""
    marks = torch.zeros(*ids.shape[:-1], count + 1, dtype=torch.bool, device=ids.device)
    # -1 lands in a last column, which is dropped.
    return marks.scatter_(-1, torch.where(ids < 0, count, ids), True)[..., :count]


def part(logits: Tensor, values: Tensor) -> PartialAttention:
    """Attention by these logits (group, queries, any), -inf where there is no key, over values
    (any, value channels), or (group, queries, any, value channels) if they differ by query.

    An importance weight 1 / pi is a logit less log pi; a cluster of n keys is one whose logit is
    larger by log n and whose value is the mean of theirs.
    """
    log_weight = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - log_weight.masked_fill(log_weight.isneginf(), 0.0)[..., None])
    if values.dim() == 2:
        return PartialAttention(weights @ values, log_weight)
    return PartialAttention(torch.matmul(weights[..., None, :], values).squeeze(-2), log_weight)


def attention(logits: Tensor, values: Tensor, sinks: Tensor | None) -> Tensor:
    """Attention over all keys together (group, queries, value channels), as `merged` has it of one
    part, by logits (group, queries, keys), -inf where there is no key, over values (keys, value
    channels). Each query has a key at least."""
    if sinks is None:
        return torch.softmax(logits, dim=-1) @ values
    total = torch.logaddexp(torch.logsumexp(logits, dim=-1), sinks[:, None])
    return torch.exp(logits - total[..., None]) @ values


def merged(parts: list[PartialAttention], sinks: Tensor | None = None) -> Tensor:
    """Attention over all parts together (group, queries, value channels), with the layer's sink
    logits (group,) in the denominator where it has them: zeros where no part has keys."""
    logs = torch.stack([part.log_weight for part in parts])
    total = torch.logsumexp(logs, dim=0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks[:, None])
    shares = torch.exp(logs - total.masked_fill(total.isneginf(), 0.0))
    outputs = torch.stack([part.output for part in parts])
    return (shares[..., None] * outputs).sum(dim=0)


def attend_ids(
    past: Past, queries: Tensor, ids: Tensor, log_inclusion: Tensor | None = None
) -> Tensor:
    """Attention over some of a past's keys, renormalised (group, queries, value channels).

    Args:
        past: the keys and values, from the sequence's first.
        queries: scaled (group, queries, channels).
        ids: the keys (group, queries, any), -1 where there are fewer.
        log_inclusion: log of the probability with which each key was sampled, like ids; then
            o = sum exp(z - log pi) v / sum exp(z - log pi), self-normalised.
    """
    logits = logits_at(queries, past.keys, ids, past.group.rules)
    if log_inclusion is not None:
        logits = logits - log_inclusion
    return merged([part(logits, past.values[ids.clamp(min=0)])], past.unit.sinks)
