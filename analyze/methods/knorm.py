"""Key norms: keys of small norm tend to be attended whatever the query."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from retrace.analyze.methods.base import EvictionMethod
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class KNorm(EvictionMethod):
    """Keeps the keys of smallest norm."""

    source: ClassVar[str] = "arXiv:2406.11430 (L2 norm-based KV cache compression), section 3"

    def importance(self, past: Past) -> Tensor:
        """-||k|| (keys,)"""
        norms: Tensor = past.keys.norm(dim=-1)
        return -norms
