"""Errors of a layer's output, all heads together, after its output projection W_o.

Heads add up there, W_o o = sum over heads of W_o[:, h] o_h, so the error of a query is known once
every head has answered it: units of a layer are replayed in step, block by block.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrace.analyze.metrics.measure import ExactBlock, outputs
from retrace.analyze.metrics.moments import Moments, empty
from retrace.analyze.units.selection import Selection
from retrace.traces import Layer, to_torch


def projection_of(layer: Layer, device: torch.device) -> Tensor | None:
    """A layer's W_o (hidden, heads x value channels) in float32; None where the trace has none.

    Raises:
        DamageError: it cannot be read.
    """
    weights = layer.output_projection
    return None if weights is None else to_torch(weights.copy()).to(device).float().flatten(1)


class ProjectedErrors:
    """||W_o (o - o')|| / ||W_o o|| of one method in one layer of a sequence: o and o' have all
    heads' outputs, side by side. What the module adds besides, a bias, is in neither."""

    def __init__(
        self,
        weights: Tensor,
        heads: int,
        positions: Tensor,
        topk: Sequence[int],
        first: Sequence[int],
    ) -> None:
        """The weights are those of `projection_of`. Positions are those of all the sequence's
        queries (queries,), ascending; `first` is the first that counts for each budget of `topk`.
        """
        self._weights = weights
        self._heads = heads
        self._topk = tuple(topk)
        self._counted = positions >= torch.tensor(list(first), device=positions.device)[:, None]
        self._answers: list[tuple[slice, slice, list[int], Tensor, Tensor]] = []
        self.moments: Moments = empty((len(self._topk),))
        """Over the queries that count, of each budget (topk,)."""

    def add(self, exact: ExactBlock, selection: Selection, points: Sequence[int]) -> None:
        """Note what the heads of one unit put out for a block's queries, at the budgets of the
        selection that `points` name."""
        block, reference = exact.block, exact.reference
        if selection.output is not None:
            output = selection.output[list(points)]
        else:
            logs = exact.log_probabilities(selection.ids)
            output = outputs(block, selection, logs, reference.log_normalizer, [*points])
        # The one budget of a plan stands for what each kv head has.
        alone = len(self._topk) == 1
        budgets = [0 if alone else self._topk.index(selection.ks[point]) for point in points]
        heads = block.unit.group.heads
        self._answers.append((block.rows, heads, budgets, output, reference.output))

    def finish(self) -> None:
        """Count the queries of a block, which every unit has answered by now."""
        if not self._answers:
            return
        start = min(rows.start for rows, *_ in self._answers)
        stop = max(rows.stop for rows, *_ in self._answers)
        some = self._answers[0][4]
        shape = stop - start, self._heads, some.shape[-1]
        # NaN, and so not counted, where a head gave no answer at a budget that is not counted.
        right = some.new_full(shape, torch.nan)
        given = some.new_full((len(self._topk), *shape), torch.nan)
        for rows, heads, budgets, output, reference in self._answers:
            place = slice(rows.start - start, rows.stop - start)
            right[place, heads] = reference.movedim(0, 1)
            for budget, own in zip(budgets, output, strict=True):
                given[budget, place, heads] = own.movedim(0, 1)
        self._answers.clear()
        # The difference is taken first: it is small, and rounding would show in that of products.
        error = (right - given).flatten(2) @ self._weights.T
        whole = right.flatten(1) @ self._weights.T
        norm, off = (
            torch.linalg.vector_norm(t, dim=-1, dtype=torch.float64) for t in (whole, error)
        )
        errors = torch.where(off == 0, 0.0, off / norm)
        self.moments = self.moments.merge(Moments.of(errors, self._counted[:, start:stop]))


def checked_projected(array: npt.NDArray[np.float64], budgets: int) -> Moments:
    """The moments (budgets,) that a file holds which anybody may have written.

    Raises:
        ValueError: it holds something else.
    """
    if array.dtype != np.float64 or array.shape != (3, budgets):
        raise ValueError("Projected errors are not those of these budgets.")
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError("Projected errors are figures that cannot be.")
    return Moments(*array)
