"""What a method selects where it runs on a cache in few bits: what it finds, puts out and reads."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from retrace.analyze.caches.view import Priced, rounded
from retrace.analyze.methods.base import AttendMethod, Method
from retrace.analyze.methods.options.cache import Cache
from retrace.analyze.metrics.attention_output import attention_output
from retrace.analyze.selection.served import Served
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block, HeadGroup

Select = Callable[[Method, Sequence[Served], Block, Sequence[int]], list[Selection]]


def select_from_cache(
    method: Method,
    serves: Sequence[Served],
    block: Block,
    ks: Sequence[int],
    points: Collection[int],
    select: Select,
) -> list[Selection]:
    """Selections with outputs of their own and the bytes of the cache's formats.

    Args:
        method: the method, which names a cache.
        serves: its states, all of which see the cache at the same position.
        block: the queries, of the unit as it is.
        ks: the budgets.
        points: those of them that want an output; at others it is NaN.
        select: selects from what the cache shows, with bytes as if it were held in full.
    """
    cache, shown = method.cache, serves[0].shown
    assert cache is not None and shown is not None
    # The block's own queries, which need not be those of the unit that the state saw.
    unit = replace(shown, queries=block.unit.queries, positions=block.unit.positions)
    seen = block.of(unit)
    # The newest tokens are charged in full, as many as each budget attends.
    asked = [tuple(ks)] if cache.step is None else [(k,) for k in ks]
    found = [s for some in asked for s in select(method, serves, seen, some)]
    in_full = [f.first_full(block.positions) for f in (cache.keys, cache.values)]
    # Of values that slide a state sees only those that it was built with.
    anew = isinstance(method, AttendMethod) and method.plain and cache.values.slides
    finished = []
    for selection in found:
        if selection.output is None or anew:
            selection = _with_output(selection, seen, block, cache, points)
        finished.append(_priced(selection, method, block, cache, in_full))
    return finished


def _with_output(
    selection: Selection, seen: Block, block: Block, cache: Cache, points: Collection[int]
) -> Selection:
    """With the output over what the cache gives back of the attended keys."""
    wanted = [i for i, k in enumerate(selection.ks) if k in points]
    valued = _valued(selection, seen, block, cache) if cache.values.slides else None
    own = attention_output(seen, selection, wanted, valued)
    output = own.new_full((len(selection.ks), *own.shape[1:]), torch.nan)
    output[wanted] = own
    return replace(selection, output=output, estimates=None, true_denominator=False)


def _valued(
    selection: Selection, seen: Block, block: Block, cache: Cache
) -> tuple[Block, Selection]:
    """A block whose unit has every rounded value and behind them every value in full, and the
    selection by the places of those that each query finds."""
    few, full = rounded(block.unit, "values", cache.values), block.unit.values
    # Keys are not looked at here: as many as values.
    both = replace(seen.unit, keys=seen.unit.keys.repeat(2, 1), values=torch.cat([few, full]))
    both.__dict__["mean_values"] = seen.unit.mean_values
    in_full = selection.ids >= cache.values.first_full(block.positions)[:, None]
    places = torch.where(in_full, selection.ids + len(few), selection.ids)
    return seen.of(both), replace(selection, ids=places)


def _priced(
    selection: Selection,
    method: Method,
    block: Block,
    cache: Cache,
    in_full: Sequence[Tensor],
) -> Selection:
    """The same at the bytes of the cache's formats: all that counts keys and values of the cache
    itself, and nothing that the method keeps beside it."""
    group = block.unit.group
    few = _bytes(group, cache)
    aux = torch.as_tensor(selection.aux_bytes, device=block.positions.device).double()
    aux = aux.expand(len(block.positions))
    if selection.unread is not None:
        start, stop = selection.unread
        first, end = block.first_visible, torch.minimum(in_full[0], block.positions + 1)
        read = (end - first).clamp(min=0)
        left_out = (end.clamp(max=stop) - first.clamp(min=start)).clamp(min=0)
        aux = aux - (read - left_out) * (group.key_bytes - few[0])
    each, saved = _saved(selection, method, group, few)
    if cache.step is not None:
        for held_from, less in zip(in_full, saved, strict=True):
            aux = aux + less * _attended_from(held_from, selection, block)
    return replace(selection, attended_bytes=each - sum(saved), aux_bytes=aux)


def _bytes(group: HeadGroup, cache: Cache) -> tuple[float, float]:
    """Of one rounded key and value."""
    rules = group.rules
    return cache.keys.bytes(rules.key_dim), cache.values.bytes(rules.value_dim)


def _saved(
    selection: Selection, method: Method, group: HeadGroup, few: tuple[float, float]
) -> tuple[float, tuple[float, float]]:
    """Bytes of an attended key and its value in full, and how many fewer they are because the key
    is rounded, and because the value is."""
    whole = group.key_bytes + group.value_bytes
    each = whole if selection.attended_bytes is None else selection.attended_bytes
    if each == method.attended_bytes(group):
        prices = (few[0], group.value_bytes), (group.key_bytes, few[1])
        less = [each - method.attended_bytes(Priced.of(group, *price)) for price in prices]
        return each, (less[0], less[1])
    # Exact search, whatever the method: values alone, or keys too where it did not rank them.
    keys = group.key_bytes - few[0] if each == whole else 0.0
    return each, (keys, group.value_bytes - few[1])


def _attended_from(first: Tensor, selection: Selection, block: Block) -> Tensor:
    """Distinct keys from a `first` one of each query (queries,) on that any head of the group
    attends (queries,), under the selection's one budget."""
    ids = selection.ids
    places = torch.arange(ids.shape[-1], device=ids.device)
    [attended] = selection.attended
    newest = (ids >= first[:, None]) & (places < attended[..., None])
    back = torch.where(newest, block.positions[:, None] - ids, -1)
    marks = torch.zeros(len(block.positions), int(back.max()) + 2, device=ids.device)
    for head in back:
        marks.scatter_(-1, torch.where(head < 0, marks.shape[-1] - 1, head), 1.0)
    return marks[:, :-1].sum(dim=-1).double()
