"""Loki: scores in the leading principal components of the keys."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import LearnedLike, ScoreMethod
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules


@dataclass(frozen=True, kw_only=True)
class Loki(ScoreMethod):
    """Scores keys on their first `rank` principal components and attends the best in full.

    The basis is fitted to the centred keys, but no mean is subtracted when keys and queries are
    rotated, as in the published code. It comes from calibration sequences, or with `basis=own` from
    the sequence's own earlier keys; later keys are then rotated by the basis as it stands.
    """

    source: ClassVar[str] = "arXiv:2406.02542 (Loki), section 4; hpcgroup/loki"

    rank: int | None = field(
        default=None, metadata={"help": "components read of every key; a quarter of all if unset"}
    )
    basis: str = field(
        default="calibration",
        metadata={"help": "whose components", "choices": ("calibration", "own")},
    )

    @property
    def fitted(self) -> bool:
        """To the sequence's own keys."""
        return self.basis == "own"

    @property
    def calibrated(self) -> bool:
        """On keys of other sequences."""
        return self.basis == "calibration"

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """The components of all sequences' keys together, most variance first."""
        return {"components": _components([past.keys for past in pasts])}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        return {"components": (torch.float32, (rules.key_dim, rules.key_dim))}

    def build(self, past: Past) -> Any:
        """The basis (channels, rank) and the keys rotated into it."""
        components = _components([past.keys]) if self.fitted else past.calibration["components"]
        basis = components[:, : self._rank(len(components))]
        return basis, past.keys @ basis

    def extend(self, state: Any, new: Past) -> Any:
        """Rotate the new keys by the basis as it stands."""
        basis, rotated = state
        return basis, torch.cat([rotated, new.keys @ basis])

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """(q W)[:rank].(k W)[:rank]"""
        basis, rotated = state
        scores: Tensor = (queries @ basis) @ rotated[: int(positions[-1]) + 1].T
        return scores

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """`rank` components of every key, and the basis."""
        channels = group.rules.key_dim
        return (keys + channels) * self._rank(channels) * group.itemsize

    def _rank(self, channels: int) -> int:
        return channels // 4 or 1 if self.rank is None else min(self.rank, channels)


def _components(parts: Sequence[Tensor]) -> Tensor:
    """Principal components (channels, channels) of keys (keys, channels), most variance first."""
    count = sum(len(keys) for keys in parts)
    mean = torch.stack([keys.double().sum(dim=0) for keys in parts]).sum(dim=0) / count
    covariance = torch.stack([(c := keys.double() - mean).T @ c for keys in parts]).sum(dim=0)
    # eigh sorts ascending.
    components: Tensor = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
    return components.to(parts[0].dtype)
