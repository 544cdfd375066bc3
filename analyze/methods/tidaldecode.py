"""TidalDecode: one layer selects, the layers above it reuse what it selected."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from retrace.analyze.methods.base import ScoreMethod
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class TidalDecode(ScoreMethod):
    """The exact best keys of the nearest selecting layer below this one, head by head.

    The paper selects in layer 2, and again in a correction layer (9, or 13 for Llama 3). Those
    layers, which read all keys to select, attend all of them, and so do the layers below the first.
    """

    source: ClassVar[str] = "arXiv:2410.05076 (TidalDecode), section 3"
    across_layers: ClassVar[bool] = True

    select: int = field(default=2, metadata={"help": "the layer that selects", "least": 0})
    correct: int = field(default=9, metadata={"help": "the layer that selects anew", "least": 0})

    def build(self, past: Past) -> Any:
        """The same kv head of the selecting layer."""
        layer = past.group.layer
        selecting = self._selecting(layer)
        if selecting == layer:
            return past
        if selecting not in past.layers:
            raise RetraceError(
                f"needs layer {selecting}, which the trace does not hold: name others with "
                "select= and correct=, or capture it too."
            )
        heads = past.layer(selecting)
        if len(heads) != past.group.rules.kv_heads:
            raise RetraceError(f"layers {selecting} and {layer} have other numbers of kv heads.")
        return heads[past.group.kv_head]

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """q.k of the selecting layer."""
        theirs = state.queries_at(positions, len(queries))
        scores: Tensor = theirs @ state.keys[: int(positions[-1]) + 1].T
        return scores

    def attends_all(self, group: HeadGroup) -> bool:
        """Where the layer selects, and below the first that does."""
        return self._selecting(group.layer) == group.layer

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Nothing else: a layer that selects attends all that it reads."""
        return 0.0

    def _selecting(self, layer: int) -> int:
        below = [chosen for chosen in (self.select, self.correct) if chosen <= layer]
        return max(below, default=layer)
