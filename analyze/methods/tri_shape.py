"""TriShape: A-shape, and all keys for the prompt's last queries."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.a_shape import AShape
from retrace.analyze.methods.base import Looks
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class TriShape(AShape):
    """A-shape, with every key for the blocks that hold the last 100 queries of the prompt, or of
    each chunk where it is read in chunks.

    `dense=N` attends all keys in the layers below the N-th too, as TriangleMix does in the shallow
    half of a model or more: it finds where by the gradient, which a trace does not hold.
    """

    source: ClassVar[str] = (
        "arXiv:2412.10319 (SCBench: Tri-shape); arXiv:2507.21526 (TriangleMix); "
        "microsoft/MInference"
    )
    looks: ClassVar[Looks] = "end"

    last: int = field(default=100, metadata={"help": "queries that attend all keys", "least": 0})
    dense: int = field(default=0, metadata={"help": "layers that do, from the first", "least": 0})

    def always(self, state: Past, queries: Tensor, positions: Tensor) -> Tensor | None:
        """Everything, where the block is of such queries or such a layer."""
        end = int(positions[-1]) + 1
        if state.group.layer >= self.dense and end <= state.end - self.last:
            return None
        return torch.ones(1, -(-end // self.block), dtype=torch.bool, device=queries.device)
