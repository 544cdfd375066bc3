"""ShadowKV: chunks found by their mean key, and keys held in low rank."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import AttendMethod
from retrace.analyze.methods.toolkit.partial_attention import (
    attended_ids,
    merged,
    part,
    visible_logits,
)
from retrace.analyze.units.attention import visible
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """The chunks of a past."""

    past: Past
    """All keys so far, later ones than are in chunks included."""
    landmarks: Tensor
    """(chunks, channels): mean key"""
    outlier: Tensor
    """(chunks,) bool: attended exactly, and not found by its landmark"""
    low_rank: Tensor
    """(chunks x size, channels): the keys in chunks, as their low rank gives them"""
    read: dict[str, Tensor] = field(default_factory=dict)
    """`exact`: how many keys in full each query of the last search read (queries,)"""


@dataclass(frozen=True, kw_only=True)
class ShadowKV(AttendMethod):
    """The k / `chunk` chunks whose mean keys, the landmarks, have most of any head's softmax, by
    keys that are put together from a low rank; outlying chunks, the last ones and all later keys
    are attended besides, exactly.

    Outliers are the chunks with a key whose direction is farthest from the landmark's. The low rank
    is of all the past's keys before position encoding, of all kv heads side by side; they are
    rotated again when they are read. `rank=0` attends the keys themselves, which tells what
    selection alone costs. The code's scale of 1 / sqrt(128) is the layer's here.
    """

    source: ClassVar[str] = "arXiv:2410.21465 (ShadowKV), section 4; bytedance/ShadowKV"
    fitted: ClassVar[bool] = True

    chunk: int = field(default=8, metadata={"help": "keys in a chunk"})
    rank: int = field(default=160, metadata={"help": "of the keys; 0 for exact keys", "least": 0})
    outliers: int = field(default=48, metadata={"help": "chunks attended exactly", "least": 0})
    local: int = field(default=4, metadata={"help": "last chunks attended exactly", "least": 0})

    def build(self, past: Past) -> Any:
        """Chunks of all but the local ones and what does not fill a chunk."""
        count = max(0, past.end // self.chunk - self.local)
        keys = past.keys[: count * self.chunk]
        chunks = keys.view(count, self.chunk, keys.shape[1])
        landmarks = chunks.mean(dim=1)
        outlier = torch.zeros(count, dtype=torch.bool, device=keys.device)
        if count:
            cosine = torch.nn.functional.cosine_similarity(chunks, landmarks[:, None], dim=-1)
            least = cosine.amin(dim=1)
            least[: past.hidden // self.chunk] = torch.inf  # chunks that no query sees any more
            farthest = least.sort(stable=True).indices
            outlier[farthest[: self.outliers]] = True
        low_rank = self._low_rank(past, len(keys)) if self.rank and count else keys
        return Chunks(past=past, landmarks=landmarks, outlier=outlier, low_rank=low_rank)

    def extend(self, state: Chunks, new: Past) -> Any:
        """Later keys are not put into chunks."""
        return replace(state, past=new.whole)

    def attend(
        self, state: Chunks, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Attention over the chosen chunks by their low rank and what is kept exactly."""
        past, held = state.past, len(state.low_rank)
        keys = past.keys.clone()
        chosen, rank = self._chosen(state, queries, positions, k)
        # The same in every head, exact where a chunk is an outlier and not chosen.
        exact = state.outlier.repeat_interleave(self.chunk)
        keys[:held] = torch.where(exact[:, None], keys[:held], state.low_rank)
        logits = visible_logits(past, queries, positions, keys)
        attended = (chosen | state.outlier).repeat_interleave(self.chunk, dim=-1)
        logits[..., :held].masked_fill_(~attended, -torch.inf)
        in_full = torch.nn.functional.pad(exact, (0, logits.shape[-1] - held), value=True)
        state.read["exact"] = (in_full & ~logits[0].isneginf()).sum(dim=-1)
        output = merged([part(logits, past.values[: logits.shape[-1]])], past.unit.sinks)
        merit = torch.nn.functional.pad(
            -rank.float().repeat_interleave(self.chunk, dim=-1), (0, logits.shape[-1] - held)
        )
        return output, attended_ids(~logits.isneginf(), merit, in_full)

    def aux_bytes(self, state: Chunks, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The landmarks that are seen and no outliers', what keys in full take beyond their share
        of the low rank, and the basis that gives keys back from it."""
        chunks = torch.ceil(keys / self.chunk).clamp(max=len(state.outlier))
        landmarks = (chunks - state.outlier.sum()).clamp(min=0) * group.key_bytes
        if not self.rank:
            return landmarks
        rank = self._rank(group)
        full = group.key_bytes - rank * group.itemsize / group.rules.kv_heads
        basis = rank * group.rules.key_dim * group.itemsize
        read: Tensor = landmarks + state.read["exact"] * full + basis
        return read

    def attended_bytes(self, group: HeadGroup) -> float:
        """A value and the key's share of the low rank, which kv heads read together."""
        if not self.rank:
            return super().attended_bytes(group)
        return group.value_bytes + self._rank(group) * group.itemsize / group.rules.kv_heads

    def _rank(self, group: HeadGroup) -> int:
        return min(self.rank, group.rules.key_dim * group.rules.kv_heads)

    def _chosen(
        self, state: Chunks, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Which chunks the group's queries (queries,) choose: bool (queries, chunks); and the rank
        of each."""
        count = len(state.landmarks)
        keys = torch.arange(count * self.chunk, device=positions.device)
        seen = visible(positions, keys, state.past.group.rules)
        seen = seen.view(len(positions), count, self.chunk).any(dim=-1) & ~state.outlier
        logits = (queries @ state.landmarks.T).masked_fill(~seen, -torch.inf)
        together = logits.softmax(dim=-1).nan_to_num(0.0).amax(dim=0).masked_fill(~seen, -1.0)
        order = together.argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(dim=-1)
        return (rank < max(1, k // self.chunk)) & seen, rank

    def _low_rank(self, past: Past, count: int) -> Tensor:
        """The first keys (count, channels) of this kv head from the low rank of all of them."""
        heads = [head.keys_before_rotation for head in past.heads]
        own = past.group.kv_head if len(heads) > 1 else 0
        together = torch.cat(heads, dim=-1).double()
        _, _, basis = torch.linalg.svd(together, full_matrices=False)
        basis = basis[: self.rank]
        channels = past.keys.shape[1]
        mine = basis[:, own * channels : (own + 1) * channels]
        approximated = (together[:count] @ basis.T @ mine).to(past.keys.dtype)
        return past.rotated(approximated, torch.arange(count, device=past.keys.device))
