"""MagicPIG: keys sampled by locality-sensitive hashing, weighted by how likely that was."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.hashing import hyperplanes, numbers
from retrace.analyze.methods.toolkit.partial_attention import (
    attended_ids,
    merged,
    part,
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
        weighted = logits.clone()
        hashed = slice(self.sink, self.sink + len(centred))
        shared, kept = torch.zeros_like(logits), torch.ones_like(logits, dtype=torch.bool)
        if len(centred):
            collisions = self._collisions(self._buckets(queries, planes), buckets)
            shared[..., hashed], kept[..., hashed] = collisions.to(shared), False
            missed = collisions < self.min_collisions
            log_pi = torch.log(self.inclusion(queries, centred) + self.offset).to(logits)
            weighted[..., hashed] -= log_pi.masked_fill(missed, torch.inf)
        output = merged([part(weighted, past.values[: logits.shape[-1]])], past.unit.sinks)
        # Those in most buckets of the query's first.
        return output, attended_ids(~weighted.isneginf(), shared, kept, self.sink)

    def inclusion(self, queries: Tensor, centred: Tensor) -> Tensor:
        """The probability over hyperplanes (group, queries, hashed) float64 that a key is sampled:
        that of `min_collisions` or more in `tables` trials of probability u^bits, u = 1 less the
        angle between query and key over pi."""
        unit = torch.nn.functional.normalize
        cosine = unit(queries.double(), dim=-1) @ unit(centred.double(), dim=-1).T
        one = (1 - torch.arccos(cosine.clamp(-1, 1)) / math.pi) ** self.bits
        fewer = torch.zeros_like(one)
        for j in range(min(self.min_collisions, self.tables + 1)):
            fewer += math.comb(self.tables, j) * one**j * (1 - one) ** (self.tables - j)
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

    @staticmethod
    def _collisions(queries: Tensor, keys: Tensor) -> Tensor:
        """In how many tables (group, queries, hashed) a query's bucket (group, queries, tables) is
        a key's (tables, hashed)."""
        count = torch.zeros(
            *queries.shape[:2], keys.shape[1], dtype=torch.int16, device=keys.device
        )
        for table, bucket in enumerate(keys):
            count += queries[..., table, None] == bucket
        return count
