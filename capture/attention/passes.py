"""One forward pass of a model: which sequences its rows are of, and what it adds to each.

The columns of a pass are those of its cache, padding included, and then its own. A row says which
of them are tokens of its sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrace.capture.attention.interface import AttentionCall
from retrace.capture.attention.rules import hides_as_ruled
from retrace.traces import LayerRules

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """One row of a batch."""

    sequence: int
    """Its number."""
    real: Mask
    """Which columns (columns,) are tokens of the sequence, and not padding."""


@dataclass(frozen=True)
class Pass:
    """One forward pass."""

    before: int
    """Columns that its cache holds already."""
    count: int
    """Columns that it adds."""
    rows: Sequence[Row]

    def slots(self, keys: int) -> tuple[int, int]:
        """Of the `keys` that a layer attends to, how many are columns, and the first of these.

        A cache of fixed size has unused keys behind them until it is full; one with a window
        drops the first columns.
        """
        columns = self.before + self.count
        used = min(keys, columns)
        return used, columns - used

    def added(self, row: Row) -> npt.NDArray[np.intp]:
        """Which of the pass's own columns (tokens,) are tokens of the row's sequence."""
        return np.flatnonzero(row.real[self.before :])

    def positions(self, row: Row) -> npt.NDArray[np.int32]:
        """Positions (tokens,) in the row's sequence of what the pass adds to it."""
        known = int(row.real[: self.before].sum())
        return np.arange(known, int(row.real.sum()), dtype=np.int32)


def added_tensors(call: AttentionCall, one: Pass, place: int) -> tuple[Tensor, ...]:
    """What a call adds to the sequence of the pass's row at this place of the batch: query, key,
    value (heads, tokens, channels) and output (tokens, heads, value channels), as views where they
    can be."""
    row = one.rows[place]
    columns = one.added(row)
    used, _ = one.slots(call.key.shape[-2])
    new = slice(used - one.count, used)
    parts = (
        call.query[place],
        call.key[place, :, new],
        call.value[place, :, new],
        call.output[place],
    )
    if len(columns) == one.count:
        return parts
    if len(columns) and len(columns) == columns[-1] - columns[0] + 1:  # padding at one end
        some = slice(int(columns[0]), int(columns[-1]) + 1)
        return (*(part[:, some] for part in parts[:3]), parts[3][some])
    chosen = torch.from_numpy(columns).to(call.query.device)
    return (*(part[:, chosen] for part in parts[:3]), parts[3][chosen])


def added_choices(call: AttentionCall, one: Pass, place: int) -> Tensor | None:
    """The keys that a natively sparse layer chose for what the pass adds to the sequence of its row
    at this place: positions (choices, tokens, kept), -1 where there are fewer, at the end. None of
    other layers."""
    if call.selected is None:
        return None
    row = one.rows[place]
    columns = torch.from_numpy(one.added(row)).to(call.selected.device)
    ids = call.selected[place][:, columns].long()
    _, first = one.slots(call.key.shape[-2])
    if first == 0 and row.real.all():
        return ids.int()
    positions = torch.from_numpy(np.cumsum(row.real) - 1).to(ids.device)
    return positions[(ids + first).clamp(min=0)].masked_fill(ids < 0, -1).int()


def attends_as_ruled(call: AttentionCall, one: Pass, rules: LayerRules) -> bool:
    """Whether each query of a pass sees the keys that the rules let it see, and no padding."""
    keys = call.key.shape[-2]
    used, first = one.slots(keys)
    if call.mask is None and (one.before if one.count > 1 else keys > used):
        return False  # the first query sees the first key alone, and a single one all of them
    alike: dict[bytes, bool] = {}
    for place, row in enumerate(one.rows):
        mask = None if call.mask is None else call.mask[place if len(call.mask) > 1 else 0]
        shared = mask is None or len(call.mask) == 1  # type: ignore[arg-type]
        known = row.real.tobytes()
        if shared and known in alike:
            continue
        alike[known] = _row_fits(mask, one, row, used, first, rules)
        if not alike[known]:
            return False
    return True


def _row_fits(
    mask: Tensor | None, one: Pass, row: Row, used: int, first: int, rules: LayerRules
) -> bool:
    """The same for one row, with its mask (heads or 1, columns of the pass, keys)."""
    queries = one.positions(row)
    if not len(queries):
        return True
    positions = np.cumsum(row.real) - 1
    seen = row.real[first:]
    least = int(positions[first:][seen][0]) if seen.any() else len(positions)
    if rules.first_visible(int(queries[0])) < least:
        return False  # a key that is to be seen is no longer in the cache
    if mask is None:
        # All keys up to its own are seen by each query.
        if not seen.all():
            return False
        return all(rules.first_visible(int(query)) <= least for query in queries)
    device = mask.device
    mask = mask[:, torch.from_numpy(one.added(row)).to(device)]
    hidden = np.ones(mask.shape[-1], bool)
    hidden[:used] = ~seen
    if hidden.any():
        if bool(mask[..., torch.from_numpy(hidden).to(device)].any()):
            return False
        mask = mask[..., torch.from_numpy(~hidden).to(device)]
    return hides_as_ruled(
        mask[None],
        torch.from_numpy(queries).long().to(device),
        torch.from_numpy(positions[first:][seen]).long().to(device),
        rules,
    )
