"""HATA: hash bits learned from attention itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import POOL, LearnedLike, ScoreMethod
from retrace.analyze.methods.toolkit.hashing import signs
from retrace.analyze.methods.toolkit.training import descend
from retrace.analyze.units.attention import visible
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules

TOP_SHARE = 0.1
"""Of a query's keys: its best, with labels that fall evenly from 20 to 1; others have -1."""
STEEPNESS, SIMILARITY, BALANCE, ORTHOGONAL = 0.1, 0.01, 1.0, 1.0
"""sigma, epsilon, lambda and eta of the loss."""
RATE, MOMENTUM = 0.1, 0.9


@dataclass(frozen=True, kw_only=True)
class HATA(ScoreMethod):
    """Scores keys by the Hamming distance of `bits` learned signs, sign(x W), of key and query,
    summed over the group.

    W is trained by gradient descent to bring the codes of a query and its best keys together, each
    bit as often 1 as -1, and W^T W close to the identity: bits x bits as in the paper, where the
    code's is channels x channels and runs only for as many bits as channels. It takes 500 queries
    from the later half of sequences, as the code does, but `batch` of them in one step. The paper
    leaves the first two layers dense.
    """

    source: ClassVar[str] = "arXiv:2506.02572 (HATA), section 3; gpzlx1/HATA"
    calibrated: ClassVar[bool] = True

    bits: int = field(default=128, metadata={"help": "bits of a code"})
    steps: int = field(default=100, metadata={"help": "steps of training", "least": 0})
    batch: int = field(default=5, metadata={"help": "queries in a step"})
    seed: int = field(default=0, metadata={"help": "of the training", "least": 0})
    pool: str = field(default="sum", metadata=POOL)

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """W (channels, bits), for keys and for queries before scaling."""
        random = torch.Generator().manual_seed(self.seed)
        channels, device = pasts[0].keys.shape[1], pasts[0].keys.device
        start = torch.randn(channels, self.bits, generator=random, dtype=torch.float64)
        start /= channels**0.5
        weights = start.to(device).requires_grad_()
        descent = torch.optim.SGD([weights], lr=RATE, momentum=MOMENTUM)
        descend(descent, self.steps, lambda: self._loss(weights, pasts, random))
        return {"weights": weights.detach().to(pasts[0].keys)}

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike:
        """What `calibrate` gives."""
        return {"weights": (torch.float32, (rules.key_dim, self.bits))}

    def _loss(self, weights: Tensor, pasts: Sequence[Past], random: torch.Generator) -> Tensor:
        """For `batch` queries of a sequence, both drawn; in float64, since the norm has no slope to
        rest on at its least, and steps around it would multiply what float32 rounds away."""
        past = pasts[int(torch.randint(len(pasts), (), generator=random))]
        count = len(past.query_positions)
        rows = torch.randint(count // 2, count, (self.batch,), generator=random)
        heads = torch.randint(len(past.queries), (self.batch,), generator=random)
        rows, heads = rows.to(past.keys.device), heads.to(past.keys.device)
        queries, positions = past.queries[heads, rows].double(), past.query_positions[rows]
        held = past.keys.double()
        keys = torch.arange(past.start, past.end, device=positions.device)
        seen = visible(positions, keys, past.group.rules)
        labels = _labels(queries @ held.T, seen)
        codes = 2 * torch.sigmoid(STEEPNESS * held @ weights) - 1
        asked = 2 * torch.sigmoid(STEEPNESS / past.group.rules.scale * queries @ weights) - 1
        # ||a - b||^2 without a tensor of (queries, keys, bits).
        apart = asked.square().sum(-1)[:, None] + codes.square().sum(-1) - 2 * asked @ codes.T
        gram = weights.T @ weights - torch.eye(self.bits).to(weights)
        similarity = (labels * apart).sum() / seen.sum()
        balance = codes.mean(dim=0).square().sum()
        loss: Tensor = SIMILARITY * similarity + BALANCE * balance + ORTHOGONAL * gram.norm()
        return loss

    def build(self, past: Past) -> Any:
        """W for scaled queries, and every key's code (keys, bits)."""
        weights = past.calibration["weights"]
        return weights, signs(past.keys @ weights)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """Less the number of bits that differ."""
        weights, codes = state
        agreement = signs(queries @ weights) @ codes[: int(positions[-1]) + 1].T
        scores: Tensor = (agreement - codes.shape[1]) / 2
        return scores

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Every key's bits, and W."""
        return keys * self.bits / 8 + group.rules.key_dim * self.bits * group.itemsize


def _labels(logits: Tensor, seen: Tensor) -> Tensor:
    """The label of every key (queries, keys) by its rank among a query's logits; 0 if not seen."""
    order = logits.masked_fill(~seen, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    best = (TOP_SHARE * seen.sum(dim=-1, keepdim=True)).ceil()
    rank = torch.arange(logits.shape[1], device=logits.device)
    by_rank = torch.where(rank < best, 20 - 19 * rank / (best - 1).clamp(min=1), -1.0)
    return torch.zeros_like(logits).scatter(-1, order, by_rank.to(logits)).masked_fill(~seen, 0.0)
