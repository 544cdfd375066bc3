"""How each level of method turns its answer into a selection."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retrace.analyze.exact.top_k import top
from retrace.analyze.methods.base import (
    AttendMethod,
    EvictionMethod,
    Method,
    ScoreMethod,
    SearchMethod,
)
from retrace.analyze.methods.hooks import calling, key_ids, numbers
from retrace.analyze.methods.options.pooling import MEAN_QUERY, pool
from retrace.analyze.methods.toolkit.partial_attention import marked
from retrace.analyze.selection.joining import in_order_of_joining
from retrace.analyze.selection.states import Served
from retrace.analyze.units.attention import first_visible, visible
from retrace.analyze.units.selection import Selection, check_finite, check_ids, missing_last, where
from retrace.analyze.units.unit import Block, Unit
from retrace.traces import RetraceError

COUNTED = "bytes are counted, from 0 on."


class CostError(RetraceError):
    """A method counts its bytes in numbers that none can be."""


def select(method: Method, served: Served, block: Block, ks: Sequence[int]) -> list[Selection]:
    """What a method attends for a block's queries at each budget of `ks`, ascending.

    Args:
        method: the method.
        served: its state for these queries.
        block: the queries.
        ks: the budgets. Those that share one ranked list share a selection.
    """
    if isinstance(method, EvictionMethod) and served.state is not None:
        return _select_by_eviction(method, served, block, ks)
    if isinstance(method, ScoreMethod):
        return _select_by_score(method, served, block, ks)
    if isinstance(method, SearchMethod):
        return [_select_by_search(method, served, block, k) for k in ks]
    if isinstance(method, AttendMethod):
        return [_select_by_attend(method, served.state, block, k) for k in ks]
    raise TypeError(
        f"{type(method).__name__} must be a ScoreMethod, a SearchMethod or an AttendMethod."
    )


@dataclass(frozen=True)
class _Ranked:
    """What a score method says of a block's queries."""

    state: Any
    """Its state."""
    ids: Tensor
    """Keys (group, queries, any), best unit first, -1 where none is."""
    scores: Tensor
    """The group's own scores (group or 1, queries, units)."""
    size: int
    """Keys in a unit."""
    first_new: int | None
    """Keys from here on are attended besides the budget."""
    evicted: Tensor | None
    """Keys (keys,) bool that are gone, and so not kept either."""
    aux_bytes: Tensor
    attended_bytes: float


def _select_by_score(
    method: ScoreMethod, served: Served, block: Block, ks: Sequence[int]
) -> list[Selection]:
    """Most methods have one list for all budgets."""
    if served.state is not None and method.attends_all(block.unit.group):
        return [_everything(block, tuple(ks))]
    found = []
    for own, shared in _sharing(method, ks):
        ranked = _rank(own, served, block, shared)
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


def _select_by_eviction(
    method: EvictionMethod, served: Served, block: Block, ks: Sequence[int]
) -> list[Selection]:
    """What the end of the past leaves, the same for every query since, and all that came later.

    Chosen once: what a later query would choose otherwise, because a layer's window or the recent
    keys that it keeps have moved on, is gone.
    """
    ended = _end_of_past(block.unit, served.built)
    heads = [(_end_of_past(unit, served.built).unit, state) for unit, state in served.heads]
    left = _select_by_score(method, replace(served, heads=tuple(heads)), ended, ks)
    aux = _aux_bytes(method, served.state, block)
    return [replace(_since(kept, served.built, block), aux_bytes=aux) for kept in left]


def _end_of_past(unit: Unit, end: int) -> Block:
    """A query at the last position before `end`, which sees what the next one will see of the keys
    so far. What it asks does not matter where keys are judged without it."""
    last = unit.positions.new_tensor([end - 1])
    block = Block(
        replace(unit, queries=torch.zeros_like(unit.queries[:, :1]), positions=last), slice(0, 1)
    )
    keys = torch.arange(end, device=last.device)
    block.__dict__["visible"] = visible(last + 1, keys, unit.group.rules)
    block.__dict__["visible_count"] = block.visible.sum(dim=-1)
    return block


def _since(left: Selection, built: int, block: Block) -> Selection:
    """The keys from `built` on, the newest first, and those of a selection (group, 1, listed) that
    each of the block's queries still sees."""
    first = torch.full_like(block.positions, built)
    new = _kept_ids(0, first, block)
    new_count = (new >= 0).sum(dim=-1)
    old = _only_visible(left.ids.expand(-1, len(block.positions), -1), block)
    still = torch.nn.functional.pad((old >= 0).cumsum(dim=-1), (1, 0))
    ids = torch.cat([new.expand(len(old), -1, -1), old], dim=-1)
    order = (ids < 0).to(torch.uint8).argsort(dim=-1, stable=True)
    estimates = left.estimates
    if estimates is not None:
        known = estimates.expand(-1, len(block.positions), -1)
        estimates = torch.cat([known.new_zeros(*known.shape[:2], new.shape[-1]), known], dim=-1)
        estimates = estimates.gather(-1, order)
    given = left.first_given
    return replace(
        left,
        ids=ids.gather(-1, order),
        attended=new_count + _keys_in_pages(still, left.attended),
        first_given=None if given is None else given.expand(-1, len(block.positions)),
        besides=new_count[0],
        estimates=estimates,
    )


def _rank(method: ScoreMethod, served: Served, block: Block, ks: tuple[int, ...]) -> _Ranked:
    """The best units for some budgets, by the scores that the method's heads pool."""
    size = 1 if served.state is None else method.unit_size
    scores = visible_scores(method, served.state, block)
    together = scores
    if served.heads:
        peers = [(block.of(unit), state) for unit, state in served.heads]
        together = torch.cat([visible_scores(method, state, peer) for peer, state in peers])
    if size > 1 or method.pool.endswith("softmax"):
        # What is kept anyway takes no page of the budget, and has no part in a softmax.
        together = together.masked_fill(_kept_units(method, ks[0], size, block), -torch.inf)
    k = int(_allowances(method, served.state, ks[-1:], block).max())
    most = k if size == 1 else max(method.units(budget) for budget in range(1, k + 1))
    ids = top(pool(method.pool, together), most)[1]
    if size > 1:
        ids = _keys_of_pages(ids, size, block)
    group = block.unit.group
    aux, each = _aux_bytes(method, served.state, block), method.attended_bytes(group)
    first_new = served.built if method.keeps_new else None
    if served.state is None and first_new is None:  # every key is read to rank them
        aux, each = block.visible_count * group.key_bytes, group.value_bytes
    ids = ids.expand(len(block.queries), -1, -1)
    evicted = None if served.state is None else method.evicted(served.state, block.end)
    return _Ranked(served.state, ids, scores, size, first_new, evicted, aux, each)


def _allowances(method: ScoreMethod, state: Any, ks: Sequence[int], block: Block) -> Tensor:
    """Keys of each budget (budgets, group or 1, 1); the budgets themselves without a state."""
    budgets = torch.tensor(ks, device=block.positions.device)[:, None, None]
    if state is None:
        return budgets
    with calling("allowance()", lambda: where(block)):
        allowed = method.allowance(state, budgets)
    allowed = key_ids(allowed, "allowance()", lambda: where(block), block.positions)
    heads = len(block.queries)
    if allowed.dim() != 3 or not all(
        size in sizes
        for size, sizes in zip(allowed.shape, ((len(ks),), (1, heads), (1,)), strict=True)
    ):
        raise RetraceError(
            f"allowance() gave shape {tuple(allowed.shape)} at {where(block)}; expected (budgets, "
            f"group or 1, 1) = {(len(ks), heads, 1)}."
        )
    return allowed


def visible_scores(method: ScoreMethod, state: Any, block: Block) -> Tensor:
    """The method's scores (group or 1, queries, units), -inf where a unit is not visible; exact
    ones while there is no state."""
    if state is None:
        return block.scores
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
    if scores.shape[-1] < units:
        missing = (0, units - scores.shape[-1])
        scores = torch.nn.functional.pad(scores, missing, value=-torch.inf)
    hidden = ~_visible_units(block, method.unit_size)
    scores = scores[..., :units].masked_fill(hidden, -torch.inf)
    check_finite(scores, "scores()", block)
    return scores


def _visible_units(block: Block, size: int) -> Tensor:
    """Which units hold a key that the query sees: bool (queries, units)."""
    return block.visible if size == 1 else _keys_in_units(block, size) > 0


def _kept_units(method: ScoreMethod, k: int, size: int, block: Block) -> Tensor:
    """Which units hold only keys that are kept under a budget of k: bool (queries, units)."""
    sink, recent = method.keep.at(k)
    keys = torch.arange(block.end, device=block.positions.device)
    free = block.visible & (keys >= sink) & (keys <= block.positions[:, None] - recent)
    return ~free if size == 1 else _in_units(free, size) == 0


def _keys_in_units(block: Block, size: int) -> Tensor:
    """How many visible keys each unit holds (queries, units)."""
    return _in_units(block.visible, size)


def _in_units(keys: Tensor, size: int) -> Tensor:
    """How many of some keys, bool (queries, keys), each unit holds (queries, units)."""
    padded = torch.nn.functional.pad(keys, (0, -keys.shape[-1] % size))
    return padded.view(len(padded), -1, size).sum(dim=-1)


def _keys_of_pages(pages: Tensor, size: int, block: Block) -> Tensor:
    """Keys (group, queries, pages * size) of pages (group, queries, pages), -1 if not visible."""
    offsets = torch.arange(size, device=pages.device)
    keys = (pages[..., None] * size + offsets).masked_fill(pages[..., None] < 0, -1)
    return _only_visible(keys.flatten(-2), block)


def _only_visible(ids: Tensor, block: Block) -> Tensor:
    """Ids (any, queries, any) with -1 in place of those that the query does not see."""
    inside = ids.clamp(0, block.end - 1)
    seen = block.visible.expand(len(ids), -1, -1).gather(-1, inside)
    return ids.masked_fill(~seen | (ids != inside), -1)


def _compose(
    method: ScoreMethod,
    ranked: _Ranked,
    log_total: Tensor | None,
    ks: tuple[int, ...],
    block: Block,
) -> Selection:
    """The always-kept keys in front of the ranked ones, and how many keys each budget attends."""
    ids, size = ranked.ids, ranked.size
    budgets = _allowances(method, ranked.state, ks, block)
    sink = method.keep.at(ks[0])[0]
    first_given = _first_given(method, ranked, ks, block)
    most, besides = method.budget.most(budgets, block.visible_count), ids.new_zeros(1)
    if ranked.first_new is not None:
        besides = block.visible[:, ranked.first_new :].sum(dim=-1)
        most = most + besides
    kept_count = ids.new_zeros((1, 1, 1))
    if sink or first_given is not None:
        kept = _kept_ids(sink, None if first_given is None else first_given[-1], block)
        if ranked.evicted is not None:
            kept = kept.masked_fill(ranked.evicted[kept.clamp(min=0)], -1)
        kept_count = _kept_counts(kept, sink, first_given)
    left = (most - kept_count).clamp(min=0)
    if first_given is not None and len(first_given) > 1:
        listed, attended = in_order_of_joining(ids, kept[0], sink, first_given, left, block.end)
        return _selection(method, ranked, log_total, ks, listed, attended, first_given, besides)
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
        affordable = [0] + [method.units(k) for k in range(1, int(budgets.max()) + 1)]
        units = torch.tensor(affordable, device=ids.device)[left]
        left = _keys_in_pages(in_pages, units)
    attended = kept_count + left
    if method.budget.by_estimate:
        estimates = ranked.scores.expand(len(listed), -1, -1).gather(-1, _units(listed, size))
        estimates = estimates.masked_fill(listed < 0, -torch.inf)
        largest = ranked.scores.amax(dim=-1, keepdim=True)
        pruned = method.budget.prune(estimates, largest, attended)
        left = (pruned - kept_count).clamp(min=0)
        if in_pages is not None:  # a page that is begun is read whole
            units = torch.searchsorted(in_pages, left.movedim(0, -1).contiguous())
            left = _keys_in_pages(in_pages, units.movedim(-1, 0))
        attended = kept_count + left
    return _selection(method, ranked, log_total, ks, listed, attended, first_given, besides)


def _selection(
    method: ScoreMethod,
    ranked: _Ranked,
    log_total: Tensor | None,
    ks: tuple[int, ...],
    listed: Tensor,
    attended: Tensor,
    first_given: Tensor | None,
    besides: Tensor,
) -> Selection:
    listed = listed[..., : max(1, int(attended[-1].max()))]
    return Selection(
        ks,
        listed,
        attended,
        sink=method.keep.at(ks[0])[0],
        first_given=first_given,
        besides=besides,
        estimates=None if log_total is None else _probabilities(ranked, log_total, listed),
        true_denominator=method.output == "true-denominator",
        aux_bytes=ranked.aux_bytes,
        attended_bytes=ranked.attended_bytes,
    )


def _first_given(
    method: ScoreMethod, ranked: _Ranked, ks: tuple[int, ...], block: Block
) -> Tensor | None:
    """The first of the newest keys that each budget keeps (budgets, queries), one row where all
    keep the same; None where none keeps any."""
    recents = [method.keep.at(k)[1] for k in ks]
    if not recents[-1] and ranked.first_new is None:
        return None
    counts = block.positions.new_tensor(recents)
    first = block.positions - counts[:, None] + 1
    if ranked.first_new is not None:
        first = first.clamp(max=ranked.first_new)
    return first[:1] if recents[0] == recents[-1] else first


def _kept_counts(kept: Tensor, sink: int, first_given: Tensor | None) -> Tensor:
    """How many of the keys that the largest budget keeps (1, queries, any) each one does
    (budgets or 1, 1, queries)."""
    if first_given is None or len(first_given) == 1:
        return (kept >= 0).sum(dim=-1)[None]
    of_budget = (kept < sink) | (kept >= first_given[..., None])
    return (of_budget & (kept >= 0)).sum(dim=-1)[:, None]


def _keys_in_pages(in_pages: Tensor, pages: Tensor) -> Tensor:
    """Keys in the first pages (budgets, group or 1, queries or 1), by the table `in_pages`
    (group, queries, listed pages + 1): (budgets, group, queries)."""
    pages = pages.clamp(max=in_pages.shape[-1] - 1).movedim(0, -1)
    return in_pages.gather(-1, pages.expand(*in_pages.shape[:2], -1)).movedim(-1, 0)


def _units(ids: Tensor, size: int) -> Tensor:
    """The unit of each key; any for the id -1."""
    return ids.clamp(min=0) if size == 1 else ids.clamp(min=0) // size


def _log_total(ranked: _Ranked, block: Block) -> Tensor:
    """log of the sum of exp(score) over all keys (group or 1, queries, 1), the keys of a page
    alike."""
    scores = ranked.scores
    if ranked.size > 1:
        scores = scores + _keys_in_units(block, ranked.size).log()
    return torch.logsumexp(scores, dim=-1, keepdim=True)


def _probabilities(ranked: _Ranked, log_total: Tensor, listed: Tensor) -> Tensor:
    """The method's own probability of each listed key, the keys of a page alike."""
    scores = ranked.scores.expand(len(listed), -1, -1).gather(-1, _units(listed, ranked.size))
    return (scores - log_total).exp().masked_fill(listed < 0, 0.0)


def _kept_ids(sink: int, first_given: Tensor | None, block: Block) -> Tensor:
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
    return _only_visible(ids[None], block)


def _select_by_search(method: SearchMethod, served: Served, block: Block, k: int) -> Selection:
    """The index's answer and the visible keys that it does not hold, ranked by exact score: an
    index compares the keys that it meets with the query, and that is its own order."""
    state, first, indexed = served.state, served.first, served.held
    positions, group = block.positions, block.unit.group
    oldest = int(first_visible(positions[:1], group.rules))
    others = torch.arange(oldest, block.end, device=positions.device)
    others = others[(others < first) | (others >= indexed)]
    candidates = others.expand(*block.queries.shape[:2], -1)
    if state is not None:
        queries = block.queries * group.rules.scale
        with calling("search()", lambda: where(block)):
            found = method.search(state, queries, k)
        found = key_ids(found, "search()", lambda: where(block), queries)
        if found.dim() != 3 or found.shape[:2] != block.queries.shape[:2]:
            raise RetraceError(
                f"search() gave shape {tuple(found.shape)} at {where(block)}; expected (group, "
                f"queries, ids) = {(*block.queries.shape[:2], k)}."
            )
        found = torch.where(found < 0, found, found + first)
        check_ids(found, block)
        candidates = torch.cat([found, candidates], dim=-1)
    # Ascending, so that a stable sort by score leaves ties to the lower key.
    candidates = _only_visible(candidates, block).sort(dim=-1).values
    order = block.scores_at(candidates).argsort(dim=-1, descending=True, stable=True)
    ids = candidates.gather(-1, order[..., :k])
    # All keys of the index are visible to these queries.
    unindexed = block.visible_count - (indexed - first)
    return Selection(
        (k,),
        ids,
        (ids >= 0).sum(dim=-1)[None],
        sink=first,
        first_given=positions.new_full((1, len(positions)), indexed),
        aux_bytes=_aux_bytes(method, state, block) + unindexed * group.key_bytes,
        attended_bytes=method.attended_bytes(group),
    )


def _select_by_attend(method: AttendMethod, state: Any, block: Block, k: int) -> Selection:
    """The method's own output, and the keys it says it attended."""
    if state is None:
        return _exact_best(block, k)
    queries = block.queries * block.unit.group.rules.scale
    with calling("attend()", lambda: where(block)):
        answer = method.attend(state, queries, block.positions.clone(), k)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise RetraceError(f"attend() gave no pair of output and ids at {where(block)}.")
    output = numbers(answer[0], "attend()", lambda: where(block), queries)
    ids = key_ids(answer[1], "attend()", lambda: where(block), queries)
    expected = (*block.queries.shape[:2], block.unit.values.shape[1])
    if output.shape != expected:
        raise RetraceError(
            f"attend() gave an output of shape {tuple(output.shape)} at {where(block)}; expected "
            f"(group, queries, value channels) = {expected}."
        )
    if ids.dim() != 3 or ids.shape[:2] != expected[:2]:
        raise RetraceError(
            f"attend() gave ids of shape {tuple(ids.shape)} at {where(block)}; expected (group, "
            f"queries, any), with {expected[:2]} in front."
        )
    check_finite(output, "attend()", block)
    check_ids(ids, block)
    ids = missing_last(ids)
    return Selection(
        (k,),
        ids,
        (ids >= 0).sum(dim=-1)[None],
        output=output[None].clone(),  # the method may use its tensor again
        aux_bytes=_aux_bytes(method, state, block),
        attended_bytes=method.attended_bytes(block.unit.group),
    )


def _exact_best(block: Block, k: int) -> Selection:
    """The k keys of largest exact score, for a fitted method that has no state yet."""
    ids = top(block.scores, k)[1]
    return Selection(
        (k,),
        ids,
        (ids >= 0).sum(dim=-1)[None],
        aux_bytes=block.visible_count * block.unit.group.key_bytes,
        attended_bytes=block.unit.group.value_bytes,
    )


def _aux_bytes(method: Method, state: Any, block: Block) -> Tensor:
    """Bytes of the state read per query of the group (queries,)."""
    if state is None:
        return torch.zeros_like(block.visible_count)
    with calling("aux_bytes()", lambda: where(block)):
        read = method.aux_bytes(state, block.visible_count.clone(), block.unit.group)
        read = torch.as_tensor(read, device=block.positions.device)
        read = read.expand(len(block.positions)).clone()
    wrong = ~read.isfinite() | (read < 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise CostError(f"aux_bytes() gave {float(read[row])} at {where(block, 0, row)}: {COUNTED}")
    each = float(method.attended_bytes(block.unit.group))
    if not 0 <= each < math.inf:
        raise CostError(f"attended_bytes() gave {each}: {COUNTED}")
    return read
