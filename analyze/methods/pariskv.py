"""ParisKV: codes that depend on no data, votes of blocks, and a rerank in four bits."""

import math
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import KEEP, POOL, ScoreMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.toolkit.hashing import hadamard, numbers, padded
from retrace.analyze.methods.toolkit.random_numbers import uniform
from retrace.analyze.methods.toolkit.sampling import smallest
from retrace.analyze.units.attention import first_visible, unseen
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules

BLOCK = 8
"""Channels of a block: 256 patterns of signs."""
LEVELS = (0.042, 0.127, 0.213, 0.303, 0.397, 0.500, 0.617, 0.763)
"""Of an element's magnitude, best for a uniform direction in eight dimensions (Lloyd-Max)."""
BOUNDS = (0.084, 0.170, 0.258, 0.350, 0.449, 0.559, 0.690)
TIERS = (0.05, 0.15, 0.30, 0.50, 0.75, 1.0)
"""Shares of the keys covered; a key in the first tier has as many votes as there are tiers."""
RATIOS = ((5_000, 0.5, 0.5), (10_000, 0.25, 0.3), (30_000, 0.2, 0.25), (math.inf, 0.1, 0.2))
"""Below so many keys: the share that is reranked, and the share that each block covers."""


@dataclass(frozen=True, kw_only=True)
class ParisKV(ScoreMethod):
    """Candidates are the keys with most votes, over blocks of 8 rotated channels, for patterns of
    signs near the query's; they are ranked by a product with their 4-bit codes.

    The rotation is random signs and a Hadamard matrix, of channels padded with zeros to a power of
    two. Ratios by the number of visible keys are the published ones unless set; ties of votes go to
    earlier keys. A budget counts the keys that are kept: the 50 to 200 retrieved in the paper are
    k = 310 to 460, and in smaller budgets recent keys take at most 83 % and sinks a tenth. Full
    attention below 2,000 keys is not imitated. New keys are encoded as they come, where the code
    does so every 256: nothing is fitted, so that the codes are the same.
    """

    source: ClassVar[str] = "arXiv:2602.07721 (ParisKV); amy-77/ParisKV"
    complete: ClassVar[bool] = False

    rerank: float | None = field(
        default=None, metadata={"help": "share of keys reranked; by their number if unset"}
    )
    cover: float | None = field(
        default=None, metadata={"help": "share of keys a block votes for; likewise"}
    )
    seed: int = field(default=0, metadata={"help": "of the rotation's signs", "least": 0})
    pool: str = field(default="mean-query", metadata=POOL)
    keep: Keep = field(
        default=Keep(sink=4, sink_most=0.1, recent=256, recent_most=0.83), metadata=KEEP
    )

    def build(self, past: Past) -> Any:
        """Rules, the rotation's signs (channels,), every key's pattern in each block (blocks, keys)
        and the vector that its code stands for (keys, rotated channels)."""
        device, rules = past.keys.device, past.group.rules
        draws = uniform(self.seed, past.group, torch.zeros(1, device=device).long(), rules.key_dim)
        flips = torch.where(draws[0, 0] < 0.5, -1.0, 1.0)
        blocks = _blocks(hadamard(past.keys * flips))
        norms = blocks.norm(dim=-1, keepdim=True)
        directions = blocks / norms.clamp(min=1e-12)
        levels = torch.tensor(LEVELS, device=device)
        bounds = torch.tensor(BOUNDS, device=device)
        magnitudes = levels[torch.bucketize(directions.abs(), bounds)]
        agreement = (magnitudes * directions.abs()).sum(dim=-1, keepdim=True).clamp(min=1e-12)
        decoded = torch.where(blocks >= 0, magnitudes, -magnitudes) * (norms / agreement)
        return rules, flips, numbers(blocks >= 0).T.long(), decoded.flatten(-2)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """The estimate of q.k, for candidates only."""
        rules, flips, patterns, decoded = state
        end = int(positions[-1]) + 1
        rotated = _blocks(hadamard(queries * flips))
        seen = positions + 1 - first_visible(positions, rules)
        rerank, cover = self._shares(seen)
        corners = torch.tensor(
            [bits[::-1] for bits in product((-1.0, 1.0), repeat=BLOCK)], device=queries.device
        )
        order = (rotated.movedim(-2, 0) @ corners.T).argsort(dim=-1, descending=True, stable=True)
        ranked = _counts(patterns, positions, rules)[:, None].expand_as(order).gather(-1, order)
        before = ranked.cumsum(dim=-1) - ranked
        share = before / (cover * seen)[:, None]
        tier = torch.bucketize(share, torch.tensor(TIERS, device=share.device), right=True)
        won = torch.empty_like(order, dtype=torch.int16)
        won.scatter_(-1, order, (len(TIERS) - tier).to(won))
        votes = won.new_zeros((*queries.shape[:2], end))
        for chances, pattern in zip(won, patterns, strict=True):
            votes += chances[..., pattern[:end]]
        least = (len(TIERS) * len(patterns) - votes).float()
        places = torch.arange(end, device=queries.device)
        least.masked_fill_(unseen(positions, places, rules), torch.inf)
        reranked = torch.ceil(rerank * seen).expand(len(queries), -1)
        scores: Tensor = rotated.flatten(-2) @ decoded[:end].T
        return scores.masked_fill_(~smallest(least, reranked), -torch.inf)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Every key's patterns, of candidates the 4-bit codes and a 2-byte weight a block, and the
        rotation's signs."""
        width = max(BLOCK, padded(group.rules.key_dim))
        read: Tensor = keys * (width / 8 + self._shares(keys)[0] * (width / 2 + width / BLOCK * 2))
        return read + group.rules.key_dim / 8

    def _shares(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The shares reranked and covered (queries,) float64, of so many visible keys."""
        bounds = torch.tensor([bound for bound, *_ in RATIOS[:-1]], device=keys.device)
        ratios = torch.tensor([r for _, *r in RATIOS], dtype=torch.float64, device=keys.device)
        rerank, cover = ratios[torch.bucketize(keys, bounds, right=True)].unbind(dim=-1)
        if self.rerank is not None:
            rerank = torch.full_like(rerank, self.rerank)
        return rerank, cover if self.cover is None else torch.full_like(cover, self.cover)


def _blocks(rotated: Tensor) -> Tensor:
    """Rotated vectors (..., channels) as blocks (..., blocks, 8)."""
    rotated = torch.nn.functional.pad(rotated, (0, -rotated.shape[-1] % BLOCK)).contiguous()
    return rotated.view(*rotated.shape[:-1], -1, BLOCK)


def _counts(patterns: Tensor, positions: Tensor, rules: LayerRules) -> Tensor:
    """How many of the patterns (blocks, keys) that queries at positions (queries,) see are which of
    the 256: (blocks, queries, 256)."""
    counts = _before(patterns, positions + 1)
    if rules.window is None and rules.chunk is None:
        return counts
    return counts - _before(patterns, first_visible(positions, rules))


def _before(patterns: Tensor, ends: Tensor) -> Tensor:
    """How many of the patterns before each of `ends` (queries,), ascending, are which."""
    start, stop = ends[[0, -1]].tolist()
    kinds = torch.arange(2**BLOCK, device=patterns.device)
    each = patterns[:, start:stop, None] == kinds
    since = torch.nn.functional.pad(each.cumsum(dim=1, dtype=torch.int32), (0, 0, 1, 0))
    places = kinds[: len(patterns), None] * len(kinds)
    earlier = torch.bincount(
        (patterns[:, :start] + places).flatten(), minlength=len(patterns) * len(kinds)
    )
    return since[:, ends - start] + earlier.view(len(patterns), 1, -1)
