"""One list for all budgets where the always-kept keys grow with the budget."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrace.analyze.compiled import compiled

Ids = NDArray[np.int64]


def in_order_of_joining(
    ranked: Tensor, kept: Tensor, sink: int, first_given: Tensor, left: Tensor, end: int
) -> tuple[Tensor, Tensor]:
    """Keys in the order in which growing budgets attend them.

    A budget attends its kept keys and the best-ranked others, as many as it has left. What a
    smaller budget attends a larger one does too, if that has as much left or more.

    Args:
        ranked: key ids (group, queries, any), best first, -1 where none is.
        kept: what the largest budget keeps (queries, any): sinks, then the newest first.
        sink: keys below this position are kept by every budget.
        first_given: the first of the newest keys that each budget keeps (budgets, queries).
        left: keys that each budget has for others (budgets, group or 1, queries or 1).
        end: keys there are.

    Returns:
        The list (group, queries, listed), -1 at its end, and how many of its keys each budget
        attends (budgets, group, queries).
    """
    group, queries, _ = ranked.shape
    device, budgets = ranked.device, len(first_given)
    attended = np.zeros((group, queries, budgets), np.int64)
    ids = np.full((group, queries, ranked.shape[-1] + kept.shape[-1]), -1, np.int64)
    _join(
        *(t.cpu().contiguous().numpy() for t in (ranked, kept)),
        sink,
        first_given.T.cpu().contiguous().numpy(),
        left.movedim(0, -1).cpu().contiguous().numpy(),
        np.full(end, -1, np.int64),
        ids,
        attended,
    )
    reached = torch.from_numpy(attended).movedim(-1, 0)
    return torch.from_numpy(ids).to(device), reached.to(device)


@compiled
def _join(
    ranked: Ids,
    kept: Ids,
    sink: int,
    first_given: Ids,
    left: Ids,
    listed_by: Ids,
    ids: Ids,
    attended: Ids,
) -> None:
    group, queries, budgets = attended.shape
    for h in range(group):
        for q in range(queries):
            this, length = h * queries + q, 0
            next_kept, next_ranked, others = 0, 0, 0
            for b in range(budgets):
                while next_kept < kept.shape[1]:
                    key = kept[q, next_kept]
                    if key >= sink and key < first_given[q, b]:
                        break
                    next_kept += 1
                    if key < 0:
                        continue
                    if listed_by[key] == this:
                        others -= 1  # it was one of the best others
                        continue
                    listed_by[key] = this
                    ids[h, q, length] = key
                    length += 1
                room = left[h % left.shape[0], q % left.shape[1], b]
                while others < room and next_ranked < ranked.shape[2]:
                    key = ranked[h, q, next_ranked]
                    next_ranked += 1
                    if key < 0 or listed_by[key] == this:
                        continue
                    listed_by[key] = this
                    ids[h, q, length] = key
                    length += 1
                    others += 1
                attended[h, q, b] = length
