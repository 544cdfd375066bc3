"""Keys by the scores that a method gives them, or their pages: pooled over heads, kept in any case,
and as many as a budget buys."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.methods.base import (
    ScoreMethod,
)
from retrace.analyze.methods.hooks import calling, key_ids, numbers
from retrace.analyze.methods.options.pooling import MEAN_QUERY, pool
from retrace.analyze.methods.toolkit.partial_attention import marked
from retrace.analyze.selection.charges import aux_bytes
from retrace.analyze.selection.joining import in_order_of_joining
from retrace.analyze.selection.served import Served, Stretch, stretches
from retrace.analyze.units.constants import constant
from retrace.analyze.units.selection import ALL_READ, Selection, check_finite, missing_last, where
from retrace.analyze.units.unit import Block
from retrace.traces import RetraceError


@dataclass(frozen=True)
class _Ranked:
    """What a score method says of a block's queries."""

    stretches: list[Stretch]
    ids: Tensor
    """Keys (group, queries, any), best unit first, -1 where none is."""
    scores: Tensor
    """The group's own scores (group or 1, queries, units)."""
    size: int
    """Keys in a unit."""
    first_new: Tensor | None
    """Keys from here on (queries,) are attended besides the budget."""
    aux_bytes: Tensor
    attended_bytes: float
    unread: tuple[int, int] | None


def select_by_score(
    method: ScoreMethod, serves: Sequence[Served], block: Block, ks: Sequence[int]
) -> list[Selection]:
    """What is attended for a block's queries, which one state after another answers, or none does.

    Scores are asked for state by state; all else is done once for all. Most methods have one list
    for all budgets.
    """
    if serves[0].state is not None and method.attends_all(block.unit.group):
        return [_everything(block, tuple(ks))]
    found, parts = [], stretches(serves, block)
    for own, shared in _sharing(method, ks):
        ranked = _rank(own, parts, block, shared)
        log_total = _log_total(ranked, block) if method.output == "mean-fill" else None
        found.append(_compose(own, ranked, log_total, shared, block))
    return found


def _everything(block: Block, ks: tuple[int, ...]) -> Selection:
    """All visible keys, those of largest exact score first."""
    best = top(block.scores, ks[-1])[1]
    rest = torch.arange(block.end, device=best.device).expand(*block.queries.shape[:2], -1)
    rest = rest.masked_fill(~block.visible | marked(best, block.end), -1)
    attended = block.visible_count.expand(len(ks), 1, -1)
    return Selection(ks, missing_last(torch.cat([best, rest], dim=-1)), attended)


def _sharing(method: ScoreMethod, ks: Sequence[int]) -> list[tuple[ScoreMethod, tuple[int, ...]]]:
    """The budgets that share one ranked list, and what the method is under them."""
    if method.nested:
        return [(method, tuple(ks))]
    found: list[tuple[ScoreMethod, tuple[int, ...]]] = []
    for k in ks:
        own = method.at(k)
        if found and found[-1][0] == own and own.keep.at(found[-1][1][0]) == own.keep.at(k):
            found[-1] = own, (*found[-1][1], k)
        else:
            found.append((own, (k,)))
    return found


def _rank(method: ScoreMethod, parts: list[Stretch], block: Block, ks: tuple[int, ...]) -> _Ranked:
    """The best units for some budgets, by the scores that the method's heads pool."""
    no_state = parts[0].served.state is None
    size = 1 if no_state else method.unit_size
    scores = _scores(method, [(part.served.state, part.block) for part in parts], block)
    together = scores
    if parts[0].served.heads:
        together = _scores_of_layer(method, parts, block)
    if size > 1 or method.pool.endswith("softmax"):
        # What is kept anyway takes no page of the budget, and has no part in a softmax.
        together = together.masked_fill(_kept_pages(method, ks[0], size, block), -torch.inf)
    k = _most_of(method, _allowances(method, parts, ks[-1:]), ks)
    most = k if size == 1 else max(method.units(budget) for budget in range(1, k + 1))
    ids = top(pool(method.pool, together), most)[1]
    if size > 1:
        ids = _keys_of_pages(ids, size, block)
    group = block.unit.group
    each = method.attended_bytes(group)
    aux = aux_bytes(method, [(part.served.state, part.block) for part in parts], block)
    first_new = None
    if method.keeps_new:
        built = [part.served.built for part in parts for _ in range(*part.rows.indices(len(aux)))]
        first_new = block.positions.new_tensor(built)
    unread = None
    if not no_state and all(method.reads_cache(part.served.state, group) for part in parts):
        unread = ALL_READ
    if no_state and first_new is None:  # every key is read to rank them
        aux, each, unread = block.visible_count * group.key_bytes, group.value_bytes, ALL_READ
    ids = ids.expand(len(block.queries), -1, -1)
    return _Ranked(parts, ids, scores, size, first_new, aux, each, unread)


def _scores(method: ScoreMethod, answered: Sequence[tuple[Any, Block]], block: Block) -> Tensor:
    """The method's scores of a block's queries, as `visible_scores` has them, that one state after
    another answers: each with the block of its own."""
    if answered[0][0] is None:
        return block.scores
    return _only_visible(method, [_answer(method, *each) for each in answered], block)


def _scores_of_layer(method: ScoreMethod, parts: Sequence[Stretch], block: Block) -> Tensor:
    """Scores of every head of the layer (heads, queries, units)."""
    of_heads = []
    for i, (unit, _) in enumerate(parts[0].served.heads):
        answered = [(part.served.heads[i][1], part.block.of(unit)) for part in parts]
        of_heads.append(_scores(method, answered, block.of(unit)))
    return torch.cat(of_heads)


def _allowances(method: ScoreMethod, parts: list[Stretch], ks: Sequence[int]) -> Tensor:
    """Keys of each budget (budgets, group or 1, queries or 1); the budgets themselves without a
    state."""
    block = parts[0].block
    budgets = constant(tuple(ks), block.positions.device)[:, None, None]
    if parts[0].served.state is None or not _has_allowance(method):
        return budgets
    found = [_allowance(method, part, budgets) for part in parts]
    if len(found) == 1:
        return found[0]
    group = len(block.queries)
    wide = [
        allowed.expand(-1, group, len(part.block.positions))
        for allowed, part in zip(found, parts, strict=True)
    ]
    return torch.cat(wide, dim=-1)


def _allowance(method: ScoreMethod, part: Stretch, budgets: Tensor) -> Tensor:
    """What one state allows of budgets (budgets, 1, 1): (budgets, group or 1, 1)."""
    block = part.block
    with calling("allowance()", lambda: where(block)):
        allowed = method.allowance(part.served.state, budgets.clone())
    allowed = key_ids(allowed, "allowance()", lambda: where(block), block.positions)
    heads = len(block.queries)
    if allowed.dim() != 3 or not all(
        size in sizes
        for size, sizes in zip(allowed.shape, ((len(budgets),), (1, heads), (1,)), strict=True)
    ):
        raise RetraceError(
            f"allowance() gave shape {tuple(allowed.shape)} at {where(block)}; expected (budgets, "
            f"group or 1, 1) = {(len(budgets), heads, 1)}."
        )
    return allowed


def _has_allowance(method: ScoreMethod) -> bool:
    """Whether heads may attend other numbers of keys than the budgets say."""
    return type(method).allowance is not ScoreMethod.allowance


def _most_of(method: ScoreMethod, allowed: Tensor, ks: Sequence[int]) -> int:
    """The largest of some allowances. A GPU that has to tell is waited for."""
    return int(allowed.max()) if _has_allowance(method) else ks[-1]


def visible_scores(method: ScoreMethod, state: Any, block: Block) -> Tensor:
    """The method's scores (group or 1, queries, units), -inf where a unit is not visible; exact
    ones while there is no state."""
    return _scores(method, [(state, block)], block)


def _answer(method: ScoreMethod, state: Any, block: Block) -> Tensor:
    """What the method says of all units (group or 1, queries, units), visible or not."""
    queries = block.queries * block.unit.group.rules.scale
    if method.pool == MEAN_QUERY:
        queries = queries.mean(dim=0, keepdim=True)
    with calling("scores()", lambda: where(block)):
        scores = method.scores(state, queries, block.positions.clone())
    scores = numbers(scores, "scores()", lambda: where(block), queries)
    units = -(-block.end // method.unit_size)
    expected = (*queries.shape[:2], units)
    short = scores.shape[-1] < units and not method.keeps_new
    if scores.dim() != 3 or scores.shape[:2] != expected[:2] or short:
        raise RetraceError(
            f"scores() gave shape {tuple(scores.shape)} at {where(block)}; expected (group, "
            f"queries, units) = {expected}, or more units."
        )
    if scores.stride(0) == 0 and method.pool == "none":
        scores = scores[:1]  # all heads alike
    return scores[..., :units]


def _only_visible(method: ScoreMethod, answers: Sequence[Tensor], block: Block) -> Tensor:
    """Scores of consecutive queries (heads, queries, units), -inf where a unit is not visible, or
    a query has fewer of them."""
    hidden = ~_visible_pages(block, method.unit_size)
    units, pad = hidden.shape[-1], torch.nn.functional.pad
    padded = [pad(own, (0, units - own.shape[-1]), value=-torch.inf) for own in answers]
    if len(padded) == 1:  # which may be what the method keeps
        scores = padded[0].masked_fill(hidden, -torch.inf)
    else:
        scores = torch.cat(padded, dim=1).masked_fill_(hidden, -torch.inf)
    check_finite(scores, "scores()", block)
    return scores


def _visible_pages(block: Block, size: int) -> Tensor:
    """Which units hold a key that the query sees: bool (queries, units)."""
    return block.visible if size == 1 else block.visible_in(size) > 0


def _kept_pages(method: ScoreMethod, k: int, size: int, block: Block) -> Tensor:
    """Which units hold only keys that are kept under a budget of k: bool (queries, units)."""
    sink, recent = method.keep.at(k)
    first = torch.full_like(block.positions, sink)
    return block.visible_in(size, first, block.positions - recent) == 0


def _keys_of_pages(pages: Tensor, size: int, block: Block) -> Tensor:
    """Keys (group, queries, pages * size) of pages (group, queries, pages), -1 if not visible."""
    offsets = torch.arange(size, device=pages.device)
    keys = (pages[..., None] * size + offsets).masked_fill(pages[..., None] < 0, -1)
    return only_visible(keys.flatten(-2), block)


def only_visible(ids: Tensor, block: Block) -> Tensor:
    """Ids (any, queries, any) with -1 in place of those that the query does not see."""
    return ids.masked_fill(~block.sees(ids), -1)


def _compose(
    method: ScoreMethod,
    ranked: _Ranked,
    log_total: Tensor | None,
    ks: tuple[int, ...],
    block: Block,
) -> Selection:
    """The always-kept keys in front of the ranked ones, and how many keys each budget attends."""
    ids, size = ranked.ids, ranked.size
    budgets = _allowances(method, ranked.stretches, ks)
    sink = method.keep.at(ks[0])[0]
    first_given = _first_given(method, ranked, ks, block)
    most, extra_keys = method.budget.most(budgets, block.visible_count), ids.new_zeros(1)
    if ranked.first_new is not None:
        since = torch.maximum(block.first_visible, ranked.first_new)
        extra_keys = (block.positions - since + 1).clamp(min=0)
        most = most + extra_keys
    kept_count = ids.new_zeros((1, 1, 1))
    if sink or first_given is not None:
        kept = kept_ids(sink, None if first_given is None else first_given[-1], block)
        kept = _not_evicted(method, ranked.stretches, kept)
        kept_count = _kept_counts(kept, sink, first_given)
    left = (most - kept_count).clamp(min=0)
    if first_given is not None and len(first_given) > 1:
        listed, attended = in_order_of_joining(
            ids, kept[0], sink, first_given, left, block.positions
        )
        return _selection(method, ranked, log_total, ks, listed, attended, first_given, extra_keys)
    if sink or first_given is not None:
        again = ids < sink
        if first_given is not None:
            again = again | (ids >= first_given[0, :, None])
        ids = ids.masked_fill(again, -1)
        listed = missing_last(torch.cat([kept.expand(len(ids), -1, -1), ids], dim=-1))
    else:
        listed = ids if size == 1 else missing_last(ids)
    in_pages = None
    if size > 1:
        # Keys in the first u pages, u = 0, 1, ...
        in_page = (ids >= 0).view(*ids.shape[:-1], -1, size).sum(dim=-1)
        in_pages = torch.nn.functional.pad(in_page.cumsum(dim=-1), (1, 0))
        most_keys = _most_of(method, budgets, ks)
        affordable = (0, *(method.units(k) for k in range(1, most_keys + 1)))
        units = constant(affordable, ids.device)[left]
        left = keys_in_pages(in_pages, units)
    attended = kept_count + left
    if method.budget.by_estimate:
        estimates = ranked.scores.expand(len(listed), -1, -1).gather(-1, _pages(listed, size))
        estimates = estimates.masked_fill(listed < 0, -torch.inf)
        largest = ranked.scores.amax(dim=-1, keepdim=True)
        pruned = method.budget.prune(estimates, largest, attended)
        left = (pruned - kept_count).clamp(min=0)
        if in_pages is not None:  # a page that is begun is read whole
            units = torch.searchsorted(in_pages, left.movedim(0, -1).contiguous())
            left = keys_in_pages(in_pages, units.movedim(-1, 0))
        attended = kept_count + left
    return _selection(method, ranked, log_total, ks, listed, attended, first_given, extra_keys)


def _selection(
    method: ScoreMethod,
    ranked: _Ranked,
    log_total: Tensor | None,
    ks: tuple[int, ...],
    listed: Tensor,
    attended: Tensor,
    first_given: Tensor | None,
    extra_keys: Tensor,
) -> Selection:
    listed = listed[..., : max(1, int(attended[-1].max()))]
    return Selection(
        ks,
        listed,
        attended,
        sink=method.keep.at(ks[0])[0],
        first_given=first_given,
        extra_keys=extra_keys,
        estimates=None if log_total is None else _probabilities(ranked, log_total, listed),
        true_denominator=method.output == "true-denominator",
        aux_bytes=ranked.aux_bytes,
        attended_bytes=ranked.attended_bytes,
        unread=ranked.unread,
    )


def _first_given(
    method: ScoreMethod, ranked: _Ranked, ks: tuple[int, ...], block: Block
) -> Tensor | None:
    """The first of the newest keys that each budget keeps (budgets, queries), one row where all
    keep the same; None where none keeps any."""
    recents = [method.keep.at(k)[1] for k in ks]
    if not recents[-1] and ranked.first_new is None:
        return None
    counts = constant(tuple(recents), block.positions.device)
    first = block.positions - counts[:, None] + 1
    if ranked.first_new is not None:
        first = torch.minimum(first, ranked.first_new)
    return first[:1] if recents[0] == recents[-1] else first


def _not_evicted(method: ScoreMethod, parts: list[Stretch], kept: Tensor) -> Tensor:
    """Kept keys (1, queries, any), -1 in place of those that are gone for good."""
    left = []
    for part in parts:
        ids, state = kept[:, part.rows], part.served.state
        evicted = None if state is None else method.evicted(state, part.block.end)
        if evicted is not None:
            ids = ids.masked_fill(evicted[ids.clamp(0, len(evicted) - 1)], -1)
        left.append(ids)
    return torch.cat(left, dim=1) if len(left) > 1 else left[0]


def _kept_counts(kept: Tensor, sink: int, first_given: Tensor | None) -> Tensor:
    """How many of the keys that the largest budget keeps (1, queries, any) each one does
    (budgets or 1, 1, queries)."""
    if first_given is None or len(first_given) == 1:
        return (kept >= 0).sum(dim=-1)[None]
    of_budget = (kept < sink) | (kept >= first_given[..., None])
    return (of_budget & (kept >= 0)).sum(dim=-1)[:, None]


def keys_in_pages(in_pages: Tensor, pages: Tensor) -> Tensor:
    """Keys in the first pages (budgets, group or 1, queries or 1), by the table `in_pages`
    (group, queries, listed pages + 1): (budgets, group, queries)."""
    pages = pages.clamp(max=in_pages.shape[-1] - 1).movedim(0, -1)
    return in_pages.gather(-1, pages.expand(*in_pages.shape[:2], -1)).movedim(-1, 0)


def _pages(ids: Tensor, size: int) -> Tensor:
    """The unit of each key; any for the id -1."""
    return ids.clamp(min=0) if size == 1 else ids.clamp(min=0) // size


def _log_total(ranked: _Ranked, block: Block) -> Tensor:
    """log of the sum of exp(score) over all keys (group or 1, queries, 1), the keys of a page
    alike."""
    scores = ranked.scores
    if ranked.size > 1:
        scores = scores + block.visible_in(ranked.size).log()
    return torch.logsumexp(scores, dim=-1, keepdim=True)


def _probabilities(ranked: _Ranked, log_total: Tensor, listed: Tensor) -> Tensor:
    """The method's own probability of each listed key, the keys of a page alike."""
    scores = ranked.scores.expand(len(listed), -1, -1).gather(-1, _pages(listed, ranked.size))
    return (scores - log_total).exp().masked_fill(listed < 0, 0.0)


def kept_ids(sink: int, first_given: Tensor | None, block: Block) -> Tensor:
    """Always-kept keys (1, queries, any): the first `sink`, and those from `first_given` (queries,)
    on, one's own first; -1 where not visible."""
    positions = block.positions[:, None]
    ids = torch.arange(sink, device=positions.device).expand(len(positions), -1)
    if first_given is not None:
        first = first_given[:, None].clamp(min=sink)  # those before are sinks already
        recent = positions - torch.arange(
            max(0, int((positions - first).max()) + 1), device=positions.device
        )
        ids = torch.cat([ids, recent.masked_fill(recent < first, -1)], dim=-1)
    return only_visible(ids[None], block)
