"""KeyDiff: the keys that are least like the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import EvictionMethod
from retrace.analyze.units.past import Past


@dataclass(frozen=True, kw_only=True)
class KeyDiff(EvictionMethod):
    """Keeps the keys whose direction differs most from the mean direction of all keys."""

    source: ClassVar[str] = "arXiv:2504.15364 (KeyDiff), section 3"

    def importance(self, past: Past) -> Tensor:
        """-cos(k, mean of k / ||k||) (keys,)"""
        directions = torch.nn.functional.normalize(past.keys, dim=-1)
        anchor = torch.nn.functional.normalize(directions.mean(dim=0), dim=0)
        return -(directions @ anchor)
