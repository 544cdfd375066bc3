"""How far the output of each prefix of a list is from the exact one, list by list."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrace.analyze.compiled.loops import compiled

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def error_norms(
    exact: Tensor,
    values: Tensor,
    ids: Tensor,
    probabilities: Tensor,
    attended: Tensor,
    besides: Tensor,
    share: Tensor,
    fill: Tensor,
) -> Tensor:
    """||o - o'|| / ||o|| (points, group, queries) float32, o' being the output over the first
    `attended` keys of a list. One walk over the list serves all points.

    Args:
        exact: o (group, queries, value channels) float32.
        values: (keys, value channels) float32.
        ids: keys (group, queries, listed), -1 only at the end.
        probabilities: of those keys (group, queries, listed) float64.
        attended: (points, group, queries), never falling.
        besides: mass in the denominator besides the attended keys' (group, queries); NaN where the
            probabilities are not divided by what is attended.
        share: of o' that attended keys have (points, group, queries), the rest being `fill`'s.
        fill: (queries, value channels).
    """
    heads, rows, listed = ids.shape
    errors = torch.empty((heads * rows, len(attended)))
    points = attended.movedim(0, -1).reshape(heads * rows, -1)
    _error_norms(
        exact.reshape(heads * rows, -1).contiguous().numpy(),
        values.contiguous().numpy(),
        ids.reshape(heads * rows, listed).contiguous().numpy(),
        probabilities.reshape(heads * rows, listed).contiguous().numpy(),
        points.contiguous().numpy(),
        besides.reshape(-1).contiguous().numpy(),
        share.movedim(0, -1).reshape(heads * rows, -1).contiguous().numpy(),
        fill.contiguous().numpy(),
        errors.numpy(),
    )
    return errors.view(heads, rows, -1).movedim(-1, 0)


@compiled
def _error_norms(
    exact: Floats,
    values: Floats,
    ids: Ids,
    probabilities: Doubles,
    attended: Ids,
    besides: Doubles,
    share: Doubles,
    fill: Floats,
    errors: Floats,
) -> None:
    rows, listed = ids.shape
    channels = values.shape[1]
    # float64, since the probabilities of what was selected may all be tiny.
    sums = np.empty(channels, np.float64)
    for r in range(rows):
        sums[:] = 0.0
        total = 0.0
        norm = 0.0
        for c in range(channels):
            norm += np.float64(exact[r, c]) ** 2
        filling = fill[r % len(fill)]
        place = 0
        for point in range(attended.shape[1]):
            end = min(attended[r, point], listed)
            while place < end:
                key = ids[r, place]
                if key >= 0:
                    probability = probabilities[r, place]
                    total += probability
                    value = values[key]
                    for c in range(channels):
                        sums[c] += probability * np.float64(value[c])
                place += 1
            whole = 1.0 if np.isnan(besides[r]) else total + besides[r]
            if whole == 0.0:
                whole = 1.0
            part = share[r, point]
            error = 0.0
            for c in range(channels):
                output = part * (sums[c] / whole) + (1.0 - part) * np.float64(filling[c])
                error += (np.float64(exact[r, c]) - output) ** 2
            errors[r, point] = np.sqrt(error / norm) if error != 0.0 else 0.0
