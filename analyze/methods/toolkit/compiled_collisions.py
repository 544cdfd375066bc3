"""Hash tables in which a query and a key share a bucket, counted on a CPU."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrace.analyze.compiled import compiled

Buckets = NDArray[np.int32]
Counts = NDArray[np.int16]


def collisions(queries: Tensor, keys: Tensor) -> Tensor:
    """In how many tables (rows, keys) int16 the bucket of each query (rows, tables) int32 is that
    of each key (tables, keys) int32."""
    count = torch.zeros((len(queries), keys.shape[1]), dtype=torch.int16)
    _collisions(queries.contiguous().numpy(), keys.contiguous().numpy(), count.numpy())
    return count


@compiled
def _collisions(queries: Buckets, keys: Buckets, count: Counts) -> None:
    rows, tables = queries.shape
    for r in range(rows):
        own = count[r]
        for t in range(tables):
            bucket, buckets = queries[r, t], keys[t]
            for j in range(len(buckets)):
                own[j] += np.int16(buckets[j] == bucket)
