"""Loki: scores in the leading principal components of the keys."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import HeadGroup, ScoreMethod


@dataclass(frozen=True, kw_only=True)
class Loki(ScoreMethod):
    """Scores keys on their first `rank` principal components and attends the best in full.

    The basis is fitted to the centred keys, but no mean is subtracted when keys and queries are
    rotated, as in the published code. There the basis comes from a calibration corpus; here from
    the sequence's own earlier keys, and later keys are rotated by the basis as it stands.
    """

    source: ClassVar[str] = "arXiv:2406.02542 (Loki), section 4; hpcgroup/loki"
    fitted: ClassVar[bool] = True

    rank: int | None = field(
        default=None, metadata={"help": "components read of every key; a quarter of all if unset"}
    )

    def build(self, keys: Tensor, values: Tensor, group: HeadGroup) -> Any:
        """The basis (channels, rank), most variance first, and the keys rotated into it."""
        centred = (keys - keys.mean(dim=0)).double()
        # eigh sorts ascending.
        basis = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(-1)
        basis = basis[:, : self._rank(keys.shape[-1])].to(keys.dtype)
        return basis, keys @ basis

    def extend(self, state: Any, keys: Tensor, values: Tensor, group: HeadGroup) -> Any:
        """Rotate the new keys by the basis as it stands."""
        basis, rotated = state
        return basis, torch.cat([rotated, keys @ basis])

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """(q W)[:rank].(k W)[:rank]; a scale would not change the order."""
        basis, rotated = state
        scores: Tensor = (queries @ basis) @ rotated[: int(positions[-1]) + 1].T
        return scores

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """`rank` components of every key."""
        return keys * self._rank(group.rules.key_dim) * group.itemsize

    def _rank(self, channels: int) -> int:
        return channels // 4 or 1 if self.rank is None else min(self.rank, channels)
