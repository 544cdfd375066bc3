"""A-shape: the first blocks and a band of the most recent ones (StreamingLLM in prefill)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import KEEP, BlockMethod
from retrace.analyze.methods.options.keep import Keep


@dataclass(frozen=True, kw_only=True)
class AShape(BlockMethod):
    """The first 128 keys, or as many as a quarter of the budget, and the newest blocks.

    Published sizes are 128 first and 3,968 recent keys whatever the prompt: `--topk 4096`.
    """

    source: ClassVar[str] = (
        "arXiv:2309.17453 (StreamingLLM), as prefill arXiv:2407.02490 (MInference), table 1"
    )

    keep: Keep = field(default=Keep(sink=128, sink_most=0.25, recent=1), metadata=KEEP)

    def block_scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """The newer the better."""
        units = -(-(int(positions[-1]) + 1) // self.block)
        newer = torch.arange(units, device=queries.device, dtype=queries.dtype)
        return newer.expand(len(queries), -1)
