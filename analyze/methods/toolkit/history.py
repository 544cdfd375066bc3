"""What methods need that answer a query by those before it."""

import torch
from torch import Tensor

from retrace.analyze.units.past import Past
from retrace.traces import RetraceError


def check_history(past: Past) -> None:
    """Refuse a past of which a query cannot be answered by those before it.

    Raises:
        RetraceError: a query between others is missing; or the heads of the layer share one cache,
            of which each query then reads other keys.
    """
    positions = past.query_positions
    gaps = (positions.diff() != 1).nonzero()
    if len(gaps):
        before, after = positions[int(gaps[0]) : int(gaps[0]) + 2].tolist()
        raise RetraceError(
            f"answers a query by those before it, and the trace has that of position {before} and "
            f"next that of {after}: capture all of them (--queries all)."
        )
    if past.group.rules.cached_bytes is not None:
        raise RetraceError(
            f"reads other keys for each query of layer {past.group.layer}, whose heads share "
            "one cache: what they read of it together is not told. Name other layers."
        )


def directions(vectors: Tensor) -> Tensor:
    """Vectors (..., channels) of length 1, whose products are cosines; 0 stays 0."""
    return torch.nn.functional.normalize(vectors, dim=-1)
