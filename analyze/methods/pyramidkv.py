"""PyramidKV: early layers keep more keys than late ones."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.snapkv import SnapKV
from retrace.analyze.past import Past


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall linearly from the first layer to the last, k keys a layer on
    average.

    Besides the window, which every layer keeps, the last layer has one key in `beta` of the mean.
    The first has no more than there are, and the last then has more. A budget within the window is
    the same in all layers. Layers are those that the trace holds: a trace of a few spans them.
    The published code rounds each layer's step down. Keys that come later are all attended.
    """

    source: ClassVar[str] = "arXiv:2406.02069 (PyramidKV), section 4; Zefan-Cai/PyramidKV"

    beta: int = field(default=20, metadata={"help": "mean budget over the last layer's"})

    def build(self, past: Past) -> Any:
        """The importance of each key (group or 1, keys), and how deep the layer is: 0 the first,
        1 the last."""
        layers = past.layers
        depth = layers.index(past.group.layer) / (len(layers) - 1) if len(layers) > 1 else 0.5
        return super().build(past), depth

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """The same for every query."""
        return super().scores(state[0], queries, positions)

    def allowance(self, state: Any, ks: Tensor) -> Tensor:
        """The layer's part of k keys for each layer."""
        importance, depth = state
        mean = (ks - self.window).double()
        first = (mean * (2 - 1 / self.beta)).clamp(max=max(0, importance.shape[-1] - self.window))
        last = 2 * mean - first
        budget = self.window + first + depth * (last - first)
        return torch.where(mean > 0, budget.round().long(), ks)
