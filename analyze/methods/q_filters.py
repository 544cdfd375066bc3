"""Q-Filters: keys by their part along the direction that queries share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import EvictionMethod, LearnedLike
from retrace.analyze.units.past import Past
from retrace.traces import LayerRules


@dataclass(frozen=True, kw_only=True)
class QFilters(EvictionMethod):
    """Keeps the keys with the largest part along the first right singular vector of calibration
    queries, which estimates the mean logit of a key up to a factor.

    One direction a kv head, from the queries of its whole group, signed so that the mean query lies
    along it. The published filters have the opposite sign, and the code negates the product.
    """

    source: ClassVar[str] = "arXiv:2503.02812 (Q-Filters), section 3"
    calibrated: ClassVar[bool] = True

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """The direction (channels,)."""
        queries = torch.cat([past.queries.flatten(0, 1) for past in pasts]).double()
        # eigh sorts ascending: the last eigenvector is the first right singular vector.
        direction = torch.linalg.eigh(queries.T @ queries).eigenvectors[:, -1]
        along = (queries.mean(dim=0) * direction).sum()
        return {"direction": torch.where(along < 0, -direction, direction)}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        return {"direction": (torch.float64, (rules.key_dim,))}

    def importance(self, past: Past) -> Tensor:
        """k.direction (keys,)"""
        return past.keys @ past.calibration["direction"].to(past.keys.dtype)
