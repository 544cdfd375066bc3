"""SOCKET: locality-sensitive hashing with soft votes."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import ScoreMethod
from retrace.analyze.methods.toolkit.hashing import hyperplanes, signs
from retrace.analyze.units import kernels
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class SOCKET(ScoreMethod):
    """Scores a key by the norm of its value times the sum, over `tables` hash tables, of the
    probability that the query gives to the key's bucket.

    A query q has h = tanh(q W) in each table, and its buckets are the corners c of a cube, with
    probability softmax(h.c / temperature). The code divides h by the root of the channels as well,
    which is a temperature 8 to 11 times as high: `divide=root-channels`.
    """

    source: ClassVar[str] = "arXiv:2602.06283 (SOCKET); skylight-org/sparse-attention-hub"

    tables: int = field(default=60, metadata={"help": "hash tables"})
    bits: int = field(default=12, metadata={"help": "hyperplanes of a table"})
    temperature: float = field(default=0.3, metadata={"help": "of the softmax over buckets"})
    divide: str = field(
        default="nothing",
        metadata={"help": "what tanh is divided by", "choices": ("nothing", "root-channels")},
    )
    seed: int = field(default=0, metadata={"help": "of the hyperplanes", "least": 0})

    def build(self, past: Past) -> Any:
        """Hyperplanes (tables, channels, bits) for scaled queries, each key's corner
        (tables, keys, bits), and the norms of values (keys,)."""
        count = self.tables * self.bits
        planes = hyperplanes(self.seed, past.group, count, past.keys.device)
        planes = planes.view(-1, self.tables, self.bits).movedim(1, 0)
        # Queries come scaled, and tanh must not see that.
        return planes / past.group.rules.scale, signs(past.keys @ planes), past.values.norm(dim=-1)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """||v|| times the sum of the probabilities of the key's buckets."""
        end = int(positions[-1]) + 1
        planes, corners, norms = state
        root = queries.shape[-1] ** 0.5 if self.divide == "root-channels" else 1.0
        soft = torch.tanh(queries.flatten(0, 1) @ planes) / (root * self.temperature)
        soft = soft.view(len(planes), *queries.shape[:2], -1)
        # The softmax's denominator over all corners is a product over the bits.
        total = torch.logaddexp(soft, -soft).sum(dim=-1)
        votes = _votes(soft, total, corners[:, :end], positions)
        return votes.mul_(norms[:end])

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Every key's buckets, the norm of its value in two bytes, and the hyperplanes."""
        count = self.tables * self.bits
        return keys * (count / 8 + 2) + group.rules.key_dim * count * group.itemsize


def _votes(soft: Tensor, total: Tensor, corners: Tensor, positions: Tensor) -> Tensor:
    """The sum over tables of exp(h.c - total) (group, queries, keys), of h (tables, group, queries,
    bits), `total` (tables, group, queries) and c (tables, keys, bits). Keys after all queries of a
    tile may have 0."""
    if kernels.usable(soft):
        from retrace.analyze.methods.toolkit.kernels.soft_votes import soft_votes

        return soft_votes(soft, total, corners, positions)
    votes = torch.zeros(*soft.shape[1:3], corners.shape[1], device=soft.device)
    for h, log_total, c in zip(soft, total, corners, strict=True):
        votes += (h @ c.T).sub_(log_total[..., None]).exp_()
    return votes
