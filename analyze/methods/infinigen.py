"""InfiniGen: scores in the few directions that queries of a head have most of."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import BUDGET, LearnedLike, ScoreMethod
from retrace.analyze.methods.options.budget import Budget
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules, RetraceError


@dataclass(frozen=True, kw_only=True)
class InfiniGen(ScoreMethod):
    """Scores keys on the columns that matter once queries and keys are skewed: turned by the right
    singular vectors of each head's calibration queries, which changes no product.

    The columns are those where the skewed queries of the past are largest in sum, and within the
    budget the keys within 4 of the largest score are attended, head by head, where the code takes
    the mean of their numbers over heads. InfiniGen speculates with the input of the layer before;
    here the layer's own queries are taken, so that its errors come on top. Later keys are skewed,
    and the columns stay. The published share of columns is 0.3; its code for Llama-2 has a margin
    of 5.
    """

    source: ClassVar[str] = "arXiv:2406.19707 (InfiniGen), section 4; snu-comparch/InfiniGen"
    fitted: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    complete: ClassVar[bool] = False  # the margin leaves keys out of any budget

    columns: float = field(default=0.3, metadata={"help": "share of skewed columns read"})
    budget: Budget = field(default=Budget("threshold", 4.0), metadata=BUDGET)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.columns <= 1:
            raise RetraceError(f"columns={self.columns}: expected more than 0, up to 1.")

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """The skew of each head (group, channels, channels), most of the queries first."""
        gram = torch.stack([(q := past.queries.double()).mT @ q for past in pasts]).sum(dim=0)
        # eigh sorts ascending.
        return {"skew": torch.linalg.eigh(gram).eigenvectors.flip(-1)}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        return {"skew": (torch.float64, (rules.group, rules.key_dim, rules.key_dim))}

    def build(self, past: Past) -> Any:
        """The chosen columns of each head's skew (group, channels, columns) and the keys in them
        (group, keys, columns)."""
        skew = past.calibration["skew"].to(past.keys.dtype)
        size = (past.queries @ skew).abs().sum(dim=1)
        chosen = size.sort(dim=-1, descending=True, stable=True).indices
        chosen = chosen[:, : self._count(skew.shape[-1])]
        basis = skew.gather(-1, chosen[:, None].expand(-1, skew.shape[1], -1))
        return basis, past.keys @ basis

    def extend(self, state: Any, new: Past) -> Any:
        """Skew the new keys."""
        basis, skewed = state
        return basis, torch.cat([skewed, new.keys @ basis], dim=1)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """q A.k A over the columns of each head; the first head's for a mean query."""
        basis, skewed = (part[: len(queries)] for part in state)
        scores: Tensor = (queries @ basis) @ skewed[:, : int(positions[-1]) + 1].mT
        return scores

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The columns of every key and of the skew, for each head its own."""
        channels = group.rules.key_dim
        columns = group.rules.group * self._count(channels)
        return (keys + channels) * columns * group.itemsize

    def _count(self, channels: int) -> int:
        return max(1, int(channels * self.columns))
