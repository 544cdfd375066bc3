"""The best keys of each row of a score matrix."""

import torch
from torch import Tensor

from retrace.analyze.exact.kernels.lists import MOST_RANKS, capacity_for, turns_for
from retrace.analyze.exact.kernels.matrix import reaching
from retrace.analyze.exact.kernels.order import order

GROUPS_TOGETHER = 64
"""Groups come in multiples of this."""


def fits(k: int) -> bool:
    """Whether lists for this many ranks can be sorted."""
    return 0 < k <= MOST_RANKS


def select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids of the k largest of each row of scores (rows, keys) float32: (rows, k) int64, descending,
    ties to the lower key, -1 where fewer are finite; and which rows are right (rows,): not those
    whose bound left more candidates than a list holds."""
    groups = turns_for(k, GROUPS_TOGETHER) * GROUPS_TOGETHER
    capacity = capacity_for(k)
    with torch.cuda.device_of(scores):
        found, counts = reaching(scores.contiguous(), k, groups, capacity)
        return order(found, counts, k, capacity)[0], counts <= capacity
