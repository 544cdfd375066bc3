"""Units of keys that a method chooses for whole blocks of queries, and what each query sees of
them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from retrace.analyze.methods.base import BlockMethod
from retrace.analyze.methods.hooks import calling, key_ids, numbers
from retrace.analyze.selection.served import Served
from retrace.analyze.units.attention import first_visible
from retrace.analyze.units.selection import BlockChoice, Selection, joined, missing_last, where
from retrace.analyze.units.unit import Block
from retrace.traces import RetraceError


def select_by_blocks(
    method: BlockMethod, served: Served, block: Block, ks: Sequence[int]
) -> list[Selection]:
    """One selection for each budget, since what a larger one chooses need not hold a smaller one's.

    Args:
        method: the method.
        served: its state for these queries.
        block: the queries: whole blocks of the protocol.
        ks: the budgets.
    """
    parts: list[list[Selection]] = [[] for _ in ks]
    for one in _blocks_of(served.protocol.block, block):
        scores = _scores(method, served, one)
        always = _always(method, served, one)
        for at, k in enumerate(ks):
            chosen = _chosen(method.at(k), served, one, k, scores, always)
            parts[at].append(_selection(method, served, one, k, chosen))
    return [*map(joined, parts)]


def _blocks_of(rows: int | None, block: Block) -> Iterator[Block]:
    """The blocks of queries in some consecutive ones, of so many `rows` each from the sequence's
    first on."""
    unit, first, count = block.unit, int(block.positions[0]), len(block.positions)
    assert rows is not None
    end = first + count
    whole = first % rows == 0 and (end % rows == 0 or end == len(unit.keys))
    if not whole or block.end != end:
        raise RetraceError(
            f"chooses for whole blocks of {rows} queries, and of that at "
            f"{where(block)} some are missing: a prefill takes every query of a sequence, and "
            f"counts from a multiple of {rows} on."
        )
    for start in range(0, count, rows):
        part = slice(start, min(start + rows, count))
        yield block if part == slice(0, count) else block.part(part)


def _scores(method: BlockMethod, served: Served, block: Block) -> Tensor | None:
    """The method's scores (group, units); None where it chooses in another way."""
    if type(method).block_scores is BlockMethod.block_scores:
        return None
    queries = block.queries * block.unit.group.rules.scale
    with calling("block_scores()", lambda: where(block)):
        scores = method.block_scores(served.state, queries, block.positions.clone())
    scores = numbers(scores, "block_scores()", lambda: where(block), queries)
    expected = (len(queries), _units(block, method.unit_size))
    if scores.shape != expected:
        raise RetraceError(
            f"block_scores() gave shape {tuple(scores.shape)} at {where(block)}; expected (group, "
            f"units) = {expected}."
        )
    if bool(scores.isnan().any()):
        head = int(scores.isnan().nonzero()[0, 0])
        raise RetraceError(f"block_scores() gave NaN at {where(block, head)}.")
    return scores.masked_fill(~_seen(block, method.unit_size), -torch.inf)


def _always(method: BlockMethod, served: Served, block: Block) -> Tensor:
    """Units that are attended whatever the budget, by `keep` apart: bool (group, units)."""
    queries = block.queries * block.unit.group.rules.scale
    shape = (len(queries), _units(block, method.unit_size))
    with calling("always()", lambda: where(block)):
        always = method.always(served.state, queries, block.positions.clone())
    if always is None:
        return torch.zeros(shape, dtype=torch.bool, device=queries.device)
    if not isinstance(always, Tensor) or always.dtype != torch.bool:
        raise RetraceError(f"always() gave no tensor of bool at {where(block)}.")
    if always.dim() != 2 or always.shape[0] not in (1, shape[0]) or always.shape[1] != shape[1]:
        raise RetraceError(
            f"always() gave shape {tuple(always.shape)} at {where(block)}; expected (group or 1, "
            f"units) = {shape}."
        )
    return always.expand(shape)


def _chosen(
    method: BlockMethod,
    served: Served,
    block: Block,
    k: int,
    scores: Tensor | None,
    always: Tensor,
) -> Tensor:
    """The units (group, any) that the block attends, -1 at the end: those that are kept in front,
    the newest first, and the others best first."""
    size, seen = method.unit_size, _seen(block, method.unit_size)
    kept = (_kept(method, k, block) | always) & seen
    queries = block.queries * block.unit.group.rules.scale
    with calling("choose()", lambda: where(block)):
        chosen = method.choose(served.state, queries, block.positions.clone(), k)
    if chosen is None and scores is None:
        raise RetraceError(
            f"choose() gave None at {where(block)}, and there are no block_scores()."
        )
    if chosen is None:
        assert scores is not None
        return _best(method, k, block.end, scores, kept, seen)
    chosen = key_ids(chosen, "choose()", lambda: where(block), queries)
    if chosen.dim() != 2 or len(chosen) != len(queries):
        raise RetraceError(
            f"choose() gave shape {tuple(chosen.shape)} at {where(block)}; expected (group, any), "
            f"of {len(queries)} heads."
        )
    _check_units(chosen, block, size, len(seen))
    inside = chosen.clamp(0, len(seen) - 1)
    left_out = ~seen[inside] | kept.gather(-1, inside) | (chosen < 0)
    return missing_last(torch.cat([_newest_first(kept), chosen.masked_fill(left_out, -1)], dim=-1))


def _check_units(chosen: Tensor, block: Block, size: int, units: int) -> None:
    """Refuse units that there are none of before the block's end, and one that comes twice."""
    if bool(((chosen < -1) | (chosen >= units)).any()):
        head, place = ((chosen < -1) | (chosen >= units)).nonzero()[0].tolist()
        raise RetraceError(
            f"choose() gave unit {int(chosen[head, place])} of {size} keys at "
            f"{where(block, head)}, and there are {units} up to the block's end."
        )
    ordered = chosen.sort(dim=-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        head, place = twice.nonzero()[0].tolist()
        raise RetraceError(
            f"choose() gave unit {int(ordered[head, place])} twice at {where(block, head)}."
        )


def _best(
    method: BlockMethod, k: int, end: int, scores: Tensor, kept: Tensor, seen: Tensor
) -> Tensor:
    """Those that are kept, and the best by scores (group, units) that a budget buys besides."""
    first = _newest_first(kept)
    others = scores.masked_fill(kept, -torch.inf)
    order = others.argsort(dim=-1, descending=True, stable=True)
    order = order.masked_fill(others.gather(-1, order).isneginf(), -1)
    listed = missing_last(torch.cat([first, order], dim=-1))
    kept_count = kept.sum(dim=-1)[:, None]
    buys = torch.tensor([[[method.units(k, end)]]], device=scores.device)
    most = method.budget.most(buys, seen.sum()[None])[0]
    count = torch.maximum(most.expand(len(scores), 1), kept_count)
    if method.budget.by_estimate:
        estimates = scores.gather(-1, listed.clamp(min=0)).masked_fill(listed < 0, -torch.inf)
        largest = scores.amax(dim=-1)[:, None, None]
        pruned = method.budget.prune(estimates[:, None], largest, count[None])[0]
        count = torch.maximum(pruned, kept_count)
    places = torch.arange(listed.shape[-1], device=listed.device)
    return listed.masked_fill(places >= count, -1)


def _newest_first(marks: Tensor) -> Tensor:
    """The units that are marked (group, units), the last of them first; -1 at the end."""
    units = torch.arange(marks.shape[-1] - 1, -1, -1, device=marks.device)
    listed = missing_last(units.expand(marks.shape).masked_fill(~marks.flip(-1), -1))
    return listed[:, : int(marks.sum(dim=-1).max())]


def _units(block: Block, size: int) -> int:
    """How many units there are up to the block's last query."""
    return -(-block.end // size)


def _seen(block: Block, size: int) -> Tensor:
    """Which units hold a key that any query of the block sees: bool (units,)."""
    units = torch.arange(_units(block, size), device=block.positions.device)
    oldest = first_visible(block.positions[:1], block.unit.group.rules)
    return (units + 1) * size > oldest


def _kept(method: BlockMethod, k: int, block: Block) -> Tensor:
    """Which units hold a key that `keep` names for any query of the block: bool (1, units)."""
    size = method.unit_size
    sink, recent = method.keep.at(k)
    units = torch.arange(_units(block, size), device=block.positions.device)
    kept = units * size < sink
    if recent:
        kept = kept | ((units + 1) * size > block.positions[0] - recent + 1)
    return kept[None]


def _selection(
    method: BlockMethod, served: Served, block: Block, k: int, chosen: Tensor
) -> Selection:
    """What each query of a block sees of the chosen units (group, any).

    Keys that all of its queries see stand alike in all lists, behind those that only some do:
    these are the newest, of the block's own units, or the oldest of a window.
    """
    size, rules = method.unit_size, block.unit.group.rules
    positions, rows = block.positions, len(block.positions)
    first, last = int(positions[0]), int(positions[-1])
    oldest = first_visible(positions, rules)
    whole = (chosen >= 0) & (chosen * size >= oldest[-1]) & ((chosen + 1) * size - 1 <= first)
    shared = _keys_of(missing_last(chosen.masked_fill(~whole, -1)), size)
    shared = shared[:, : max(1, int(whole.sum(dim=-1).max()) * size)]
    partial = missing_last(chosen.masked_fill(whole, -1))
    partial = partial[:, : max(1, int((partial >= 0).sum(dim=-1).max()))]
    # Newest first: -1 is the least.
    own = _keys_of(partial, size).sort(dim=-1, descending=True).values[:, None]
    own = own.expand(-1, rows, -1)
    hidden = (own > positions[:, None]) | (own < oldest[:, None]) | (own > last)
    own = missing_last(own.masked_fill(hidden, -1))
    own = own[..., : max(1, int((own >= 0).sum(dim=-1).max()))]
    count = (own >= 0).sum(dim=-1)
    attended = count + (shared >= 0).sum(dim=-1)[:, None]
    width = max(1, int(attended.max()))
    places = torch.arange(width, device=own.device).expand(len(own), rows, -1)
    behind = places - count[..., None]
    from_shared = shared[:, None].expand(-1, rows, -1)
    ids = torch.where(
        behind < 0,
        own.gather(-1, places.clamp(max=own.shape[-1] - 1)),
        from_shared.gather(-1, behind.clamp(0, shared.shape[-1] - 1)),
    ).masked_fill(places >= attended[..., None], -1)
    sink, recent = method.keep.at(k)
    given = (first - recent + 1) // size * size
    return Selection(
        (k,),
        ids,
        attended[None],
        sink=-(-sink // size) * size,
        first_given=positions.new_full((1, rows), max(given, 0)) if recent else None,
        attended_bytes=method.attended_bytes(block.unit.group),
        choice=BlockChoice(
            _marked(chosen, _units(block, size))[:, None],
            size,
            rows,
            torch.full((rows,), _operations(method, served, block), dtype=torch.float64),
        ),
    )


def _keys_of(units: Tensor, size: int) -> Tensor:
    """Keys (group, any * size) of units (group, any), -1 for the unit -1."""
    keys = units[..., None] * size + torch.arange(size, device=units.device)
    return keys.masked_fill(units[..., None] < 0, -1).flatten(-2)


def _marked(units: Tensor, count: int) -> Tensor:
    """Which of `count` units (group, count) are among these (group, any)."""
    marks = torch.zeros(len(units), count + 1, dtype=torch.bool, device=units.device)
    return marks.scatter_(-1, torch.where(units < 0, count, units), True)[:, :count]


def _operations(method: BlockMethod, served: Served, block: Block) -> float:
    """Multiply-adds of one head to choose, for each query of a block."""
    group, position = block.unit.group, int(block.positions[0])
    first, end = served.protocol.chunk_of(position, len(block.unit.keys))
    own = method.operations(len(block.positions), block.end, group) / len(block.positions)
    return own + method.build_operations(end - first, end, group) / (end - first)
