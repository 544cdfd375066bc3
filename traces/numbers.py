"""Numbers that no attention can be computed from: NaN, infinity, and what overflows float32."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LARGEST = float(np.finfo(np.float32).max)


def norms_of(tensor: Array) -> Array:
    """Norms (heads, positions) float32 of vectors (heads, positions, channels) of any of a trace's
    dtypes; NaN or infinite where a number is, or where its square overflows float32."""
    with np.errstate(all="ignore"):
        heads = (np.linalg.norm(vectors.astype(np.float32), axis=-1) for vectors in tensor)
        return np.stack([norms.astype(np.float32) for norms in heads])


def bad_vector(tensor: Array, norms: Array) -> tuple[int, int, str] | None:
    """Head and place of the first vector that no attention can be computed from, by the `norms_of`
    them, and what is wrong with it in words; None if there is none."""
    if np.isfinite(norms).all():
        return None
    head, row = map(int, np.argwhere(~np.isfinite(norms))[0])
    numbers = tensor[head, row].astype(np.float64)
    bad = numbers[~np.isfinite(numbers)]
    if len(bad):
        return head, row, f"it holds {'NaN' if np.isnan(bad[0]) else bad[0]}"
    largest = np.abs(numbers).max()
    return head, row, f"numbers as large as {largest:.3g}, whose squares overflow float32,"


def bad_score(
    query_norms: Array, key_norms: Array, positions: Array, scale: float
) -> tuple[int, int, str] | None:
    """Head and place of the first query whose scores may overflow float32, and that in words; None
    if there is none.

    Args:
        query_norms: (heads, queries).
        key_norms: (kv_heads, positions).
        positions: of the queries (queries,).
        scale: factor of products.
    """
    longest = np.maximum.accumulate(key_norms.astype(np.float64), axis=1)[:, positions]
    longest = np.repeat(longest, len(query_norms) // len(key_norms), axis=0)
    most = query_norms * longest * abs(scale)
    if (most <= LARGEST).all():
        return None
    head, row = map(int, np.argwhere(most > LARGEST)[0])
    return head, row, f"products with keys, up to {most[head, row]:.3g} in size, overflow float32"
