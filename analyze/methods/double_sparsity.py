"""Double Sparsity: scores from a few channels that calibration found to matter."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import LearnedLike, ScoreMethod
from retrace.analyze.methods.toolkit.quantisation import rounded
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules


@dataclass(frozen=True, kw_only=True)
class DoubleSparsity(ScoreMethod):
    """Scores keys on one channel of `gamma`, the same for all queries of a head, in few bits.

    Channels are ranked on calibration sequences by the mean of |q k|, query and key of the same
    token; the published scripts also rank by the query's or the key's magnitude alone. Queries are
    rounded as the keys are. Scores are the products over the channels chosen, on the scale of
    logits, where the code divides by the root of their number: the order is the same.
    """

    source: ClassVar[str] = "arXiv:2408.07092, section 3; andy-yang-1/DoubleSparse"
    calibrated: ClassVar[bool] = True

    gamma: int = field(default=8, metadata={"help": "one channel of so many is read"})
    bits: int = field(default=4, metadata={"help": "bits of a channel that is read"})
    rank_by: str = field(
        default="product",
        metadata={"help": "what ranks channels", "choices": ("product", "query", "key")},
    )

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """Mean magnitude of each channel (group, channels)."""
        total = torch.zeros_like(pasts[0].queries[:, 0], dtype=torch.float64)
        for past in pasts:
            queries = past.queries.double().abs()
            keys = past.keys[past.query_positions - past.start].double().abs()
            if self.rank_by == "product":
                queries = queries * keys
            total += (keys if self.rank_by == "key" else queries).sum(dim=-2)
        count = sum(len(past.query_positions) for past in pasts)
        return {"magnitude": total / count}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        return {"magnitude": (torch.float64, (rules.group, rules.key_dim))}

    def build(self, past: Past) -> Any:
        """The channels of each head (group, channels read) and the keys there, rounded
        (group, keys, channels read)."""
        magnitude = past.calibration["magnitude"]
        chosen = magnitude.sort(dim=-1, descending=True, stable=True).indices
        chosen = chosen[:, : self._channels(chosen.shape[-1])]
        labels = past.keys.T[chosen].mT
        return chosen, rounded(labels, self.bits)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """q[C].k[C] for the channels C of each head; the first head's for a mean query."""
        chosen, labels = (part[: len(queries)] for part in state)
        index = chosen[:, None].expand(-1, queries.shape[1], -1)
        read = rounded(queries.gather(-1, index), self.bits)
        scores: Tensor = read @ labels[:, : int(positions[-1]) + 1].mT
        return scores

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The channels of every key and which they are, in two bytes, for each head its own."""
        channels = group.rules.group * self._channels(group.rules.key_dim)
        return channels * (keys * self.bits / 8 + 2)

    def _channels(self, channels: int) -> int:
        return max(1, channels // self.gamma)
