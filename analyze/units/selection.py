"""The keys that a method attends, as one ranked list per query, and what is allowed in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64, Real
from torch import Tensor

from retrace.analyze.units.unit import Block
from retrace.traces import RetraceError

SORT_COST = 8
"""How many times dearer it is to sort an id than to mark a key."""
ALL_READ = (0, 0)
"""No keys are `unread`."""


QUERY_AXES = {
    "ids": 1,
    "attended": 2,
    "first_given": 1,
    "extra_keys": 0,
    "estimates": 1,
    "output": 2,
    "aux_bytes": 0,
}
"""The axis of a selection's tensors along which there are queries."""
ALIKE = ("attended", "extra_keys")
"""Those that have one number where all queries are alike."""


@dataclass(frozen=True)
class BlockChoice:
    """What a method chose for whole blocks of queries, whose keys all of their queries share."""

    chosen: Bool[Tensor, "group blocks units"]
    """Which units of consecutive keys each block of queries attends, as far as its queries see
    them."""
    size: int
    """Keys in a unit."""
    rows: int
    """Queries in a block, but for the last one of a sequence."""
    operations: Float64[Tensor, "queries"]
    """Multiply-adds of one head that choosing took, spread over the queries that it was for."""


@dataclass(frozen=True)
class Selection:
    """The keys that a method attends for each query of a block, at several budgets.

    At budget `ks[b]` a query attends the first `attended[b]` keys of its list, or all that it has.
    """

    ks: tuple[int, ...]
    """Budgets, ascending."""
    ids: Int64[Tensor, "group queries listed"]
    """Key ids, best first, -1 only at the end."""
    attended: Int64[Tensor, "budgets #group #queries"]
    """Keys attended at each budget, never falling; one number where heads or queries are alike."""
    sink: int = 0
    """Keys below this position did not have to be found: they are always kept."""
    first_given: Int64[Tensor, "#budgets queries"] | None = None
    """Nor did keys from this position of each query on: kept, or not yet indexed. Never rising from
    one budget to the next, or one number for all."""
    extra_keys: Int64[Tensor, "#queries"] | int = 0
    """How many of the attended keys come besides the budget: of each query, or alike."""
    estimates: Float[Tensor, "group queries listed"] | None = None
    """For mean fill: the method's own probability of each listed key."""
    true_denominator: bool = False
    """Whether the output is divided by the sum over all visible keys."""
    output: Float[Tensor, "budgets group queries value_channels"] | None = None
    """The method's own output at each budget."""
    aux_bytes: Real[Tensor, "queries"] | float = 0.0
    """Bytes read to find the list, per query of the whole group."""
    attended_bytes: float | None = None
    """Bytes of one attended key and value, read once for the group; both in full if None."""
    unread: tuple[int, int] | None = None
    """Visible keys outside of these positions, from one to before the other, were read in full from
    the cache to find the list, and are among the `aux_bytes`; none were if None."""
    choice: BlockChoice | None = None
    """What the keys were chosen by, where blocks of queries share them."""

    def given_from(
        self, ids: Int64[Tensor, "group queries any"]
    ) -> Int64[Tensor, "group queries any"]:
        """The first budget at which each key did not have to be found; the number of budgets where
        all had to."""
        budgets = torch.full_like(ids, len(self.ks))
        if self.first_given is not None:
            at = (self.first_given[..., None, :, None] > ids).sum(dim=0)
            budgets = torch.where(at == len(self.first_given), budgets, at)
        return budgets.masked_fill(ids < self.sink, 0)

    def rows(self, rows: slice) -> "Selection":
        """The same for some of the queries, which need be no whole blocks."""
        return self._taken(rows)

    def rows_at(self, rows: Int64[Tensor, "rows"]) -> "Selection":
        """The same for queries by their places, which may come more than once."""
        return self._taken(rows)

    def _taken(self, rows: slice | Tensor) -> "Selection":
        def some(name: str, axis: int) -> Any:
            field = getattr(self, name)
            if not isinstance(field, Tensor) or (name in ALIKE and field.shape[axis] == 1):
                return field
            return field[(slice(None),) * axis + (rows,)]

        tensors = {name: some(name, axis) for name, axis in QUERY_AXES.items()}
        return replace(self, **tensors, choice=None)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What is the same for all queries of a selection: those of one kind can be joined."""
        absent = (self.first_given is None, self.estimates is None, self.output is None)
        flags = (self.sink, self.true_denominator, self.attended_bytes, self.unread)
        return (self.ks, *absent, *flags)

    @property
    def anything_given(self) -> bool:
        """Whether any key did not have to be found."""
        return self.sink > 0 or self.first_given is not None


def joined(parts: Sequence[Selection]) -> Selection:
    """What is attended by consecutive queries, of which each part, all of one `kind`, has some."""
    if len(parts) == 1:
        return parts[0]
    rows = [part.ids.shape[1] for part in parts]
    budgets, heads = len(parts[0].ks), max(part.attended.shape[1] for part in parts)
    listed = max(part.ids.shape[-1] for part in parts)

    def lists(tensors: Sequence[Tensor], nothing: float) -> Tensor:
        """Lists of several lengths, one after the other."""
        missing = [(0, listed - tensor.shape[-1]) for tensor in tensors]
        pad = torch.nn.functional.pad
        padded = [pad(t, m, value=nothing) for t, m in zip(tensors, missing, strict=True)]
        return torch.cat(padded, dim=1)

    def each(numbers: Sequence[Any], *shape: int) -> Tensor:
        """Numbers (..., queries or 1) of all queries."""
        device = parts[0].ids.device
        tensors = [torch.as_tensor(number, device=device) for number in numbers]
        wide = [t.expand(*shape, count) for t, count in zip(tensors, rows, strict=True)]
        return torch.cat(wide, dim=-1)

    return replace(
        parts[0],
        ids=lists([part.ids for part in parts], -1),
        attended=each([part.attended for part in parts], budgets, heads),
        first_given=_all_or_none(parts, "first_given", lambda found: each(found, budgets)),
        extra_keys=each([part.extra_keys for part in parts]),
        estimates=_all_or_none(parts, "estimates", lambda found: lists(found, 0.0)),
        output=_all_or_none(parts, "output", lambda found: torch.cat(found, dim=2)),
        choice=_joined_choices([part.choice for part in parts]),
        aux_bytes=each([part.aux_bytes for part in parts]),
    )


def _joined_choices(parts: Sequence[BlockChoice | None]) -> BlockChoice | None:
    """What consecutive blocks chose, if all say it."""
    choices = [part for part in parts if part is not None]
    if len(choices) < len(parts):
        return None
    units = max(choice.chosen.shape[-1] for choice in choices)
    pad = torch.nn.functional.pad
    return BlockChoice(
        torch.cat([pad(c.chosen, (0, units - c.chosen.shape[-1])) for c in choices], dim=1),
        choices[0].size,
        max(choice.rows for choice in choices),  # the last of a sequence may have fewer
        torch.cat([choice.operations for choice in choices]),
    )


def _all_or_none(
    parts: Sequence[Selection], name: str, join: Callable[[list[Tensor]], Tensor]
) -> Tensor | None:
    """A tensor of all parts, where they have it."""
    return None if getattr(parts[0], name) is None else join([getattr(p, name) for p in parts])


def missing_last(ids: Int64[Tensor, "*lists listed"]) -> Int64[Tensor, "*lists listed"]:
    """Ids with every -1 at the end and the order of the others kept."""
    return ids.gather(-1, (ids < 0).to(torch.uint8).argsort(dim=-1, stable=True))


def check_ids(ids: Int64[Tensor, "group queries any"], block: Block) -> None:
    """Refuse ids that a query can't attend, naming the first.

    Those are a future key, one outside the layer's window, and a key that comes twice.
    """
    positions = block.positions[:, None]
    seen = block.sees(ids)
    if bool((~seen & (ids != -1)).any()):
        head, row, place = (~seen & (ids != -1)).nonzero()[0].tolist()
        key = int(ids[head, row, place])
        kind = "a future key" if key > int(positions[row]) else "a key that the query can't see"
        raise RetraceError(f"returned {kind}, {key}, at {where(block, head, row)}.")
    twice = _repeated(ids, block.end)
    if bool(twice.any()):
        head, row, place = twice.nonzero()[0].tolist()
        key = int(ids[head, row, place])
        raise RetraceError(f"returned key {key} twice at {where(block, head, row)}.")


def _repeated(ids: Int64[Tensor, "*lists listed"], end: int) -> Bool[Tensor, "*lists listed"]:
    """Which ids below `end` stand in their list once more; never -1."""
    places = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    if SORT_COST * ids.shape[-1] < end:
        ordered, order = ids.sort(dim=-1, stable=True)
        again = torch.nn.functional.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0))
        repeated = torch.zeros_like(again).scatter_(-1, order, again)
    else:  # Each key has one place, that of the last of those that list it.
        shown = torch.where(ids < 0, end, ids)
        place = places.new_empty((*ids.shape[:-1], end + 1)).scatter_(-1, shown, places)
        repeated = place.gather(-1, shown) != places
    return repeated & (ids >= 0)


def check_finite(tensor: Float[Tensor, "group queries any"], name: str, block: Block) -> None:
    """Refuse NaN in a method's tensor, naming where the first is."""
    # One pass in the usual case: a sum is NaN only where a term is, or where infinities cancel.
    if bool(tensor.sum().isnan()) and bool(tensor.isnan().any()):
        head, row = tensor.isnan().nonzero()[0].tolist()[:2]
        raise RetraceError(f"{name} gave NaN at {where(block, head, row)}.")


def where(block: Block, head: int = 0, row: int = 0) -> str:
    """Names a query of a block, `head` being its place in the group."""
    return block.unit.group.place(int(block.positions[row]), head)
