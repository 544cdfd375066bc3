"""What methods share that are indexes of a vector library."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def rows(vectors: Tensor) -> npt.NDArray[np.float32]:
    """Vectors (..., channels) as a library takes them: (any, channels) on the host."""
    flat = vectors.flatten(0, -2).cpu().numpy()
    return np.ascontiguousarray(flat, dtype=np.float32)


def answers(found: npt.NDArray[Any], queries: Tensor) -> Tensor:
    """What a library found for queries (group, queries, channels), (all of them, k), as ids
    (group, queries, k) int64 on their device."""
    ids = torch.from_numpy(np.asarray(found, dtype=np.int64))
    return ids.view(*queries.shape[:2], -1).to(queries.device)
