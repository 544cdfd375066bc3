"""TOVA: the keys that the last query attends to."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from retrace.analyze.methods.base import EvictionMethod
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class TOVA(EvictionMethod):
    """Keeps the keys that the last query attends to most, on average over all heads of the layer,
    so that all of them keep the same keys.

    The paper drops one key with every new query, as under `decode:1`; elsewhere a past is judged
    once, at its end.
    """

    source: ClassVar[str] = "arXiv:2401.06104 (TOVA), section 3.2"

    def importance(self, past: Past) -> Tensor:
        """Mean attention of the last query (keys,)."""
        return past.layer_attention(slice(-1, None)).mean(dim=(0, 1, 2))
