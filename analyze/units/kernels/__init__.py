"""Exact attention and selection on a GPU, in Triton, without ever holding queries x keys scores.

    flash       output, normalizer, and the maximum of every group of keys, in one pass
    bound       the k-th largest maximum, which at least k scores of the query reach
    candidates  a second pass over queries and keys, for the few scores that reach the bound
    order       those few, sorted: scores descending, ties to the lower key

`exact` strings them together; `select` does the same for scores that are given. Beside a kernel
stand the few lines of PyTorch that define it. The modules here need Triton: import them only where
`usable` says so.
"""

import logging
from functools import cache
from importlib.util import find_spec

from torch import Tensor

log = logging.getLogger("retrace")


def usable(tensor: Tensor) -> bool:
    """Whether the kernels run where this tensor is."""
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    if find_spec("triton") is not None:
        return True
    log.warning("Triton is not installed: the exact pass takes PyTorch's operations, far slower.")
    return False
