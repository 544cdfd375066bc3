"""What methods need that answer a query by those before it."""

import torch
from torch import Tensor

from retrace.analyze.units.past import Past
from retrace.traces import RetraceError


def follow_one_another(past: Past) -> Tensor:
    """The positions of a past's queries (queries,), of which none between them is missing.

    Raises:
        RetraceError: one is.
    """
    positions = past.query_positions
    gaps = (positions.diff() != 1).nonzero()
    if len(gaps):
        before, after = positions[int(gaps[0]) : int(gaps[0]) + 2].tolist()
        raise RetraceError(
            f"answers a query by those before it, and the trace has that of position {before} and "
            f"next that of {after}: capture all of them (--queries all)."
        )
    return positions


def directions(vectors: Tensor) -> Tensor:
    """Vectors (..., channels) of length 1, whose products are cosines; 0 stays 0."""
    return torch.nn.functional.normalize(vectors, dim=-1)
