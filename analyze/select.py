"""How each level of method turns its answer into a selection."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retrace.analyze.methods.base import AttendMethod, Method, ScoreMethod, SearchMethod
from retrace.analyze.pooling import MEAN_QUERY, POOLINGS
from retrace.analyze.selection import Selection, check_finite, check_ids, missing_last
from retrace.analyze.top import top
from retrace.analyze.unit import Block
from retrace.traces import RetraceError


def select(
    method: Method, state: Any, indexed: int, block: Block, ks: Sequence[int]
) -> list[Selection]:
    """What a method attends for a block's queries at each budget of `ks`, ascending.

    Args:
        method: the method.
        state: its state; None while it has none, when all keys are searched exactly.
        indexed: how many keys the state holds.
        block: the queries.
        ks: the budgets. Those that share one ranked list share a selection.
    """
    if isinstance(method, ScoreMethod):
        return _select_by_score(method, state, block, ks)
    if isinstance(method, SearchMethod):
        return [_select_by_search(method, state, indexed, block, k) for k in ks]
    if isinstance(method, AttendMethod):
        return [_select_by_attend(method, state, block, k) for k in ks]
    raise TypeError(
        f"{type(method).__name__} must be a ScoreMethod, a SearchMethod or an AttendMethod."
    )


def _select_by_score(
    method: ScoreMethod, state: Any, block: Block, ks: Sequence[int]
) -> list[Selection]:
    """Most methods have one list for all budgets; one per always-kept set where that varies."""
    scores = block.scores if state is None else _visible_scores(method, state, block)
    size = 1 if state is None else method.unit_size
    pooled = POOLINGS[method.pool](scores) if method.pool != MEAN_QUERY else scores
    if method.pool.endswith("softmax"):
        # After a softmax, what is not visible holds 0, which is not the least.
        pooled = pooled.masked_fill(~_visible_units(block, size), -torch.inf)
    most = max(ks) if size == 1 else max(method.units(k) for k in ks)
    ids = top(pooled, most)[1]
    if size > 1:
        ids = _keys_of_pages(ids, size, block)
    ids = ids.expand(len(block.queries), -1, -1)
    kept_sets: dict[tuple[int, int], list[int]] = {}
    for k in ks:
        kept_sets.setdefault(method.keep.at(k), []).append(k)
    probabilities = torch.softmax(scores, dim=-1) if method.output == "mean-fill" else None
    aux, holds_keys = _aux_bytes(method, state, block), method.holds_keys
    if state is None:  # every key is read to rank them
        aux, holds_keys = block.visible_count * block.unit.group.key_bytes, True
    return [
        _compose(method, size, ids, tuple(shared), block, probabilities, aux, holds_keys)
        for shared in kept_sets.values()
    ]


def _visible_scores(method: ScoreMethod, state: Any, block: Block) -> Tensor:
    """The method's scores (group or 1, queries, units), -inf where a unit is not visible."""
    queries = block.queries
    if method.pool == MEAN_QUERY:
        queries = queries.mean(dim=0, keepdim=True)
    scores = method.scores(state, queries, block.positions)
    units = -(-block.end // method.unit_size)
    expected = (*queries.shape[:2], units)
    if scores.dim() != 3 or scores.shape[:2] != expected[:2] or scores.shape[2] < units:
        raise RetraceError(
            f"scores() gave shape {tuple(scores.shape)}; expected (group, queries, units) = "
            f"{expected}, or more units."
        )
    hidden = ~_visible_units(block, method.unit_size)
    scores = scores[..., :units].masked_fill(hidden, -torch.inf)
    check_finite(scores, "scores()", block)
    return scores


def _visible_units(block: Block, size: int) -> Tensor:
    """Which units hold a key that the query sees: bool (queries, units)."""
    if size == 1:
        return block.visible
    padded = torch.nn.functional.pad(block.visible, (0, -block.end % size))
    return padded.view(len(padded), -1, size).any(dim=-1)


def _keys_of_pages(pages: Tensor, size: int, block: Block) -> Tensor:
    """Keys (group, queries, pages * size) of pages (group, queries, pages), -1 if not visible."""
    offsets = torch.arange(size, device=pages.device)
    return _only_visible((pages[..., None] * size + offsets).flatten(-2), block)


def _only_visible(ids: Tensor, block: Block) -> Tensor:
    """Ids (any, queries, any) with -1 in place of those that the query does not see."""
    inside = ids.clamp(0, block.end - 1)
    seen = block.visible.expand(len(ids), -1, -1).gather(-1, inside)
    return ids.masked_fill(~seen | (ids != inside), -1)


def _compose(
    method: ScoreMethod,
    size: int,
    ids: Tensor,
    ks: tuple[int, ...],
    block: Block,
    probabilities: Tensor | None,
    aux_bytes: Tensor,
    holds_keys: bool,
) -> Selection:
    """The always-kept keys in front of the ranked ones, and how many keys each budget attends."""
    sink, recent = method.keep.at(ks[0])
    budgets = torch.tensor(ks, device=ids.device)[:, None, None]
    kept_count = ids.new_zeros((1, 1))
    if sink or recent:
        kept = _kept_ids(sink, recent, block).expand(len(ids), -1, -1)
        kept_count = (kept >= 0).sum(dim=-1)
        ids = ids.masked_fill(method.keep.contains(ids, block.positions, ks[0]), -1)
        listed = missing_last(torch.cat([kept, ids], dim=-1))
    else:
        listed = ids if size == 1 else missing_last(ids)
    left = (budgets - kept_count).clamp(min=0)
    if size > 1:
        affordable = [0] + [method.units(k) for k in range(1, ks[-1] + 1)]
        units = torch.tensor(affordable, device=ids.device)[left]
        # Keys in the first u pages, u = 0, 1, ...
        in_page = (ids >= 0).view(*ids.shape[:-1], -1, size).sum(dim=-1)
        in_pages = torch.nn.functional.pad(in_page.cumsum(dim=-1), (1, 0))
        units = units.clamp(max=in_pages.shape[-1] - 1).movedim(0, -1)
        left = in_pages.gather(-1, units.expand(*ids.shape[:2], -1)).movedim(-1, 0)
    attended = kept_count + left
    listed = listed[..., : max(1, int(attended[-1].max()))]
    estimates = None
    if probabilities is not None:
        estimates = probabilities.expand(len(listed), -1, -1).gather(-1, listed.clamp(min=0))
        estimates = estimates.masked_fill(listed < 0, 0.0)
    return Selection(
        ks,
        listed,
        attended,
        sink=sink,
        first_given=block.positions - recent + 1 if recent else None,
        estimates=estimates,
        aux_bytes=aux_bytes,
        holds_keys=holds_keys,
    )


def _kept_ids(sink: int, recent: int, block: Block) -> Tensor:
    """Always-kept keys (1, queries, sink + recent), newest last but one's own first among the
    recent, -1 where not visible."""
    positions = block.positions[:, None]
    sinks = torch.arange(sink, device=positions.device).expand(len(positions), -1)
    recents = positions - torch.arange(recent, device=positions.device)
    recents = recents.masked_fill(recents < sink, -1)  # those are sinks already
    return _only_visible(torch.cat([sinks, recents], dim=-1)[None], block)


def _select_by_search(
    method: SearchMethod, state: Any, indexed: int, block: Block, k: int
) -> Selection:
    """The index's answer and the keys that it does not hold yet, ranked by exact score."""
    since = torch.arange(indexed, block.end, device=block.positions.device)
    candidates = since.expand(*block.queries.shape[:2], -1)
    if state is not None:
        found = method.search(state, block.queries * block.unit.group.rules.scale, k)
        if found.dim() != 3 or found.shape[:2] != block.queries.shape[:2]:
            raise RetraceError(
                f"search() gave shape {tuple(found.shape)}; expected (group, queries, ids) = "
                f"{(*block.queries.shape[:2], k)}."
            )
        check_ids(found, block, windowed=False)
        candidates = torch.cat([found, candidates], dim=-1)
    # Ascending, so that a stable sort by score leaves ties to the lower key.
    candidates = _only_visible(candidates, block).sort(dim=-1).values
    order = block.scores_at(candidates).argsort(dim=-1, descending=True, stable=True)
    ids = candidates.gather(-1, order[..., :k])
    unindexed = (block.positions - indexed + 1) * block.unit.group.key_bytes
    return Selection(
        (k,),
        ids,
        (ids >= 0).sum(dim=-1)[None],
        first_given=block.positions.new_full((len(block.positions),), indexed),
        aux_bytes=_aux_bytes(method, state, block) + unindexed,
    )


def _select_by_attend(method: AttendMethod, state: Any, block: Block, k: int) -> Selection:
    """The method's own output, and the keys it says it attended."""
    output, ids = method.attend(state, block.queries, block.positions, k)
    expected = (*block.queries.shape[:2], block.unit.values.shape[1])
    if output.shape != expected:
        raise RetraceError(
            f"attend() gave an output of shape {tuple(output.shape)}; expected "
            f"(group, queries, value channels) = {expected}."
        )
    check_finite(output, "attend()", block)
    check_ids(ids, block)
    ids = missing_last(ids)
    return Selection(
        (k,),
        ids,
        (ids >= 0).sum(dim=-1)[None],
        output=output[None],
        aux_bytes=_aux_bytes(method, state, block),
    )


def _aux_bytes(method: Method, state: Any, block: Block) -> Tensor:
    """Bytes of the state read per query of the group (queries,)."""
    if state is None:
        return torch.zeros_like(block.visible_count)
    read = method.aux_bytes(state, block.visible_count, block.unit.group)
    return torch.as_tensor(read, device=block.positions.device).expand(len(block.positions))
