"""What a method attends, as the kernels read it."""

from bisect import bisect
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from retrace.analyze.metrics.measure import ExactBlock, log_sink_mass
from retrace.analyze.units.constants import constant
from retrace.analyze.units.selection import Selection


@dataclass(frozen=True)
class Lists:
    """A selection's tensors on one device."""

    ids: Tensor
    """(group, queries, listed) int64, of which only the last axis need be contiguous."""
    attended: Tensor
    """(budgets, group, queries) int64, with strides of 0 where it is the same for all."""
    ks: Tensor
    """(budgets,) int64, ascending."""
    from_rank: Tensor
    """The first budget that counts a key of each exact rank (ranks + 1,) int32; past the last one
    for those beyond."""
    points: Tensor
    """Indices into `ks` of the budgets asked for (points,) int64."""
    extra_keys: Tensor
    """(queries or 1,) int64"""
    sink: int
    first_given: Tensor | None
    """(budgets, queries) int64, with strides of 0 where it is the same for all budgets."""
    estimates: Tensor | None
    """(group, queries, listed) contiguous, where the mean value stands for what is left out."""
    fill: Tensor | None
    """The mean value that each query sees (queries, value channels), if so."""
    own_output: Tensor | None
    renormalised: bool
    log_sink_mass: Tensor
    """(group, queries) float64"""

    @classmethod
    def of(cls, exact: ExactBlock, selection: Selection, points: list[int]) -> "Lists":
        """A selection's, for the budgets that `points` names."""
        block, ids = exact.block, selection.ids
        group, rows, _ = ids.shape
        device, given = ids.device, selection.first_given
        estimates, extra_keys = selection.estimates, selection.extra_keys
        return cls(
            ids if ids.stride(-1) == 1 else ids.contiguous(),
            selection.attended.expand(-1, group, rows),
            constant(selection.ks, device),
            _from_rank(selection.ks, exact.no_rank, device),
            constant(tuple(points), device),
            extra_keys if isinstance(extra_keys, Tensor) else constant((extra_keys,), device),
            selection.sink,
            None if given is None else given.expand(len(selection.ks), -1),
            None if estimates is None else estimates.expand(ids.shape).contiguous(),
            None if estimates is None else block.unit.mean_values[block.positions],
            selection.output,
            not selection.true_denominator,
            log_sink_mass(block.unit, exact.reference.log_normalizer).contiguous(),
        )

    @property
    def anything_given(self) -> bool:
        """Whether any key did not have to be found."""
        return self.sink > 0 or self.first_given is not None


@lru_cache(maxsize=1024)
def _from_rank(ks: tuple[int, ...], ranks: int, device: torch.device) -> Tensor:
    starts = [bisect(ks, rank) for rank in range(ranks)]
    return torch.tensor([*starts, len(ks)], dtype=torch.int32, device=device)
