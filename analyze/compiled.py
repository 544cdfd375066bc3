"""How loops are compiled."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(loop: Callable[..., Any], **options: Any) -> Any:
    """Compile a loop when it is first called, and for all later processes where there is a folder
    to keep it in. It leaves Python's lock to other threads: `analyze` runs a task on each core."""
    try:
        return njit(loop, cache=True, nogil=True, **options)
    except RuntimeError:  # numba can write neither beside the source nor in the user's cache
        return njit(loop, nogil=True, **options)


def compiled_sums(loop: Callable[..., Any]) -> Any:
    """Compile a loop whose sums may be taken in any order, several terms at once."""
    return compiled(loop, fastmath={"reassoc", "contract"})
