"""PyramidKV: early layers keep more keys than late ones."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from retrace.analyze.methods.snapkv import SnapKV
from retrace.analyze.units.constants import constant


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall linearly from the first layer to the last, k keys a layer on
    average.

    Besides the window, which every layer keeps, the last layer has one key in `beta` of the mean,
    and one key at the least. The first has no more than there are, and the last then has more.
    Layers are those that the trace holds: a trace of a few spans them. Keys that come later are all
    attended.

    The authors' code rounds the step from one layer to the next down, so that L layers keep up to
    (L - 1) / 2 keys more than k on average, 14.5 where L is 30, and a larger k can leave a late
    layer fewer; here each layer's own number is rounded. Where a past is shorter than twice the
    mean, that code leaves all layers alike.
    """

    source: ClassVar[str] = "arXiv:2406.02069 (PyramidKV), section 4; Zefan-Cai/KVCache-Factory"

    beta: int = field(default=20, metadata={"help": "mean budget over the last layer's"})

    def allowance(self, state: Any, ks: Tensor) -> Tensor:
        """The layer's part of k keys for each layer."""
        layers, keys = state.past.layers, len(state.past.keys)
        depth = layers.index(state.past.group.layer) / (len(layers) - 1) if len(layers) > 1 else 0.5
        most = max(0, keys - self.window)
        # Of so few numbers each operation of a GPU would take longer than all of this.
        budgets = tuple(self._budget(k, depth, most) for k in ks.flatten().tolist())
        return constant(budgets, ks.device).view(ks.shape)

    def _budget(self, k: int, depth: float, most: int) -> int:
        """What a layer at a depth from 0 to 1 has of k keys, the first `most` and the window."""
        mean = k - self.window
        if mean <= 0:
            return k
        first = min(2 * mean - max(mean / self.beta, min(mean, 1)), most)
        last = 2 * mean - first
        return round(self.window + first + depth * (last - first))
