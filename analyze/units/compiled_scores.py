"""Exact scores of some keys, one product after another."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrace.analyze.compiled import compiled, compiled_sums

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def scores_at(queries: Tensor, keys: Tensor, ids: Tensor, scale: float, bound: float) -> Tensor:
    """Scores (group, queries, any) float64 of the keys that are listed for each query, -inf for the
    id -1: products of float32 numbers are exact in float64, and so nearly are their sums.

    Args:
        queries: (group, queries, channels) float32.
        keys: (keys, channels) float32.
        ids: (group, queries, any) int64.
        scale: factor of their inner products.
        bound: softcap of scores; 0 for none.
    """
    scores = torch.empty(ids.shape, dtype=torch.float64)
    arrays = (tensor.contiguous().numpy() for tensor in (queries, keys, ids))
    _scores_at(*arrays, scale, bound, scores.numpy())
    return scores


@compiled
def _scores_at(
    queries: Floats, keys: Floats, ids: Ids, scale: float, bound: float, scores: Doubles
) -> None:
    group, rows, listed = ids.shape
    for h in range(group):
        for q in range(rows):
            for i in range(listed):
                key = ids[h, q, i]
                if key < 0:
                    scores[h, q, i] = -np.inf
                else:
                    scores[h, q, i] = score(queries[h, q], keys[key], scale, bound)


@compiled_sums
def score(query: Floats, key: Floats, scale: float, bound: float) -> float:
    """The score of one key."""
    dot = 0.0
    for c in range(len(query)):
        dot += np.float64(query[c]) * np.float64(key[c])
    scaled = dot * scale
    return np.tanh(scaled / bound) * bound if bound > 0.0 else scaled
