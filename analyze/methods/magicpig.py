"""MagicPIG: keys sampled by locality-sensitive hashing, weighted by how likely that was."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.hashing import collisions, hyperplanes, numbers
from retrace.analyze.methods.toolkit.partial_attention import (
    attended_ids,
    attention,
    visible_logits,
)
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class MagicPIG(AttendMethod):
    """Attends the keys that share a bucket with the query in `min_collisions` or more of `tables`
    hash tables of `bits` signs each, every key's weight divided by the probability of that.

    There is no budget: the sample is what the tables give, attended whole at every k, since a cut
    would bias it. `bits` and `tables` set its size; compare by density. Sinks, the `window` keys
    before the tables were built and all keys since are attended exactly. The mean of the hashed
    keys is subtracted from them and not from queries, as the authors do; another implementation
    (sparse-attention-hub) centres both and asks for one collision. 4 sinks are from memory.
    """

    source: ClassVar[str] = "arXiv:2410.16179 (MagicPIG), section 4; Infini-AI-Lab/MagicPIG"

    bits: int = field(default=10, metadata={"help": "signs that name a bucket"})
    tables: int = field(default=150, metadata={"help": "hash tables"})
    min_collisions: int = field(default=2, metadata={"help": "tables that a sampled key shares"})
    offset: float = field(default=1e-4, metadata={"help": "added to probabilities of sampling"})
    sink: int = field(default=4, metadata={"help": "first keys, attended exactly", "least": 0})
    window: int = field(
        default=64, metadata={"help": "last keys, attended exactly, when tables are built"}
    )
    seed: int = field(default=0, metadata={"help": "of the hyperplanes", "least": 0})

    @property
    def fitted(self) -> bool:
        """To the mean of the keys hashed."""
        return True

    def build(self, past: Past) -> Any:
        """The past, hyperplanes (channels, tables x bits), the hashed keys less their mean
        (hashed, channels), and their buckets (tables, hashed)."""
        hashed = past.keys[self.sink : max(self.sink, past.end - self.window)]
        centred = hashed - hashed.mean(dim=0) if len(hashed) else hashed
        planes = hyperplanes(self.seed, past.group, self.tables * self.bits, past.keys.device)
        return past, planes, centred, self._buckets(centred, planes).T.contiguous()

    def extend(self, state: Any, new: Past) -> Any:
        """Later keys are attended exactly, and never hashed."""
        _, *tables = state
        return new.whole, *tables

    def attend(
        self, state: Any, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Self-normalised importance sampling, joined with the exact part; k is not looked at."""
        past, planes, centred, buckets = state
        logits = visible_logits(past, queries, positions)
        width = logits.shape[-1]
        keys = torch.arange(width, device=logits.device)
        first, end = self.sink, self.sink + len(centred)
        kept = (keys < first) | (keys >= end)
        shared = logits.new_zeros(1)
        if len(centred):
            outside = (first, width - end)
            shared = collisions(self._buckets(queries, planes), buckets)
            shared = torch.nn.functional.pad(shared, outside)
            # How likely a key was sampled concerns only those that were: few of all.
            sampled = (shared >= self.min_collisions).flatten().nonzero().squeeze(-1)
            cosines = _cosines(queries, torch.nn.functional.pad(centred, (0, 0, *outside)))
            log_pi = torch.log(self._chance(cosines.flatten()[sampled]) + self.offset)
            weighted = logits.flatten()[sampled] - log_pi.to(logits)
            logits.masked_fill_(~kept, -torch.inf)
            logits.view(-1)[sampled] = weighted
        output = attention(logits, past.values[:width], past.unit.sinks)
        # Those in most buckets of the query's first.
        return output, attended_ids(logits != -torch.inf, shared, kept, self.sink, ordered=k)

    def inclusion(self, queries: Tensor, centred: Tensor) -> Tensor:
        """The probability over hyperplanes (group, queries, hashed) float64 that a key is sampled:
        that of `min_collisions` or more in `tables` trials of probability u^bits, u = 1 less the
        angle between query and key over pi."""
        return self._chance(_cosines(queries, centred))

    def _chance(self, cosine: Tensor) -> Tensor:
        """That probability for the cosine of the angle, like it."""
        one = (1 - torch.arccos(cosine.clamp(-1, 1)) / math.pi) ** self.bits
        least = min(self.min_collisions, self.tables + 1)
        other = 1 - one
        # Fewer than `least` trials succeed in as many ways as these terms say.
        ways: Tensor | float = 1.0
        for j in range(1, least):
            ways = ways * other + math.comb(self.tables, j) * one**j
        fewer = other ** (self.tables + 1 - least) * ways
        # A key that was sampled had some probability, however it is rounded.
        return (1 - fewer).clamp(min=torch.finfo(one.dtype).eps)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """For each head, `tables` buckets of 4-byte ids, if all buckets are of one size; and the
        hyperplanes."""
        planes = group.rules.key_dim * self.tables * self.bits * group.itemsize
        return keys * (4.0 * group.rules.group * self.tables / 2.0**self.bits) + planes

    def _buckets(self, vectors: Tensor, planes: Tensor) -> Tensor:
        """The bucket in each table (..., tables) of vectors (..., channels)."""
        bits = vectors @ planes >= 0
        return numbers(bits.view(*bits.shape[:-1], self.tables, self.bits))


def _cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosines (group, queries, keys) float64 of the angles between queries (group, queries,
    channels) and keys (keys, channels)."""
    unit = torch.nn.functional.normalize
    return unit(queries.double(), dim=-1) @ unit(keys.double(), dim=-1).T
