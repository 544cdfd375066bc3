"""How far along queries are, in buckets that double: their position, and the age of their index."""

import numpy as np
import torch
from torch import Tensor

from retrace.analyze.units.protocol import Protocol

AXES = {
    "position": "the query's own position",
    "distance": "positions since what its state may be built from: since P under the protocol "
    "prefix:P, since the first eviction under decode:R, since the last time that states were built "
    "anew under all:R",
}
"""What queries are told apart by, by name."""

MOST_BUCKETS = 32
"""Of an axis: positions and distances are below 2^31."""


def buckets_of(positions: Tensor, length: int, protocol: Protocol) -> Tensor:
    """The bucket of each query of a sequence of this length, on every axis (axes, queries) int64.

    Bucket 0 is of the number 0, and bucket b of 2^(b - 1) to 2^b - 1.

    >>> buckets_of(torch.tensor([5, 64, 67]), 100, Protocol(prefix=64))
    tensor([[3, 7, 7],
            [3, 0, 2]])
    """
    at = positions.tolist()
    built = np.array([protocol.since(position, length) for position in at], np.int64)
    along = np.stack([np.array(at, np.int64), at - built])
    # A float of 0.5 to 1 times 2^b: that is how many binary digits a number has.
    return torch.from_numpy(np.frexp(along)[1].astype(np.int64))


def first_of(bucket: int) -> int:
    """The least number in a bucket.

    >>> [first_of(bucket) for bucket in range(5)]
    [0, 1, 2, 4, 8]
    """
    return 1 << (bucket - 1) if bucket else 0
