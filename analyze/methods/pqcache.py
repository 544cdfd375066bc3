"""PQCache: keys by product quantisation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from retrace.analyze.methods.base import KEEP, POOL, ScoreMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.toolkit.kmeans import kmeans_of_each, nearest
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class PQCache(ScoreMethod):
    """Scores keys by the centroids that stand for their parts.

    A key is cut into `parts`, and each is replaced by one of 2^`bits` centroids, found by k-means
    (Euclidean, as published by default). Later keys are encoded with the centroids as they stand.
    Softmaxes of the estimates, over the keys that are not kept anyway, are summed over the group.
    What 32 sinks leave of the budget is half recent and half found, as published; the sinks, which
    the code counts beside a budget that is a share of a long context, take at most a quarter of it
    here, so that the published number holds from k = 128 on. Sinks are encoded too, and have their
    part in the centroids only. The published code chooses the rounds of k-means by the time there
    is.
    """

    source: ClassVar[str] = "arXiv:2407.12820 (PQCache), section 3; HugoZHL/PQCache"
    fitted: ClassVar[bool] = True

    parts: int = field(default=2, metadata={"help": "parts of a key"})
    bits: int = field(default=6, metadata={"help": "bits of a part's code"})
    iterations: int = field(default=20, metadata={"help": "rounds of k-means"})
    pool: str = field(default="sum-softmax", metadata=POOL)
    keep: Keep = field(
        default=Keep(sink=32, sink_most=0.25, recent_share=0.5, of_rest=True), metadata=KEEP
    )

    def build(self, past: Past) -> Any:
        """The centroids of every part (parts, centroids, its channels), and every key's codes
        (parts, keys)."""
        return self.build_each([past])[0]

    def build_each(self, pasts: Sequence[Past]) -> Sequence[Any]:
        """The states of several pasts."""
        keys = [self._parts(past.keys) for past in pasts]
        return kmeans_of_each(keys, [2**self.bits] * len(keys), self.iterations)

    def extend(self, state: Any, new: Past) -> Any:
        """Encode the new keys."""
        centroids, codes = state
        return centroids, torch.cat([codes, nearest(self._parts(new.keys), centroids)], dim=-1)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """The sum over parts of the query's product with the key's centroid."""
        centroids, codes = state
        end = int(positions[-1]) + 1
        products = self._parts(queries.flatten(0, 1)) @ centroids.mT
        by_part = (of[:, own[:end]] for of, own in zip(products, codes, strict=True))
        scores: Tensor = next(by_part)
        for part in by_part:
            scores += part
        return scores.view(*queries.shape[:2], end)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Every key's codes, and the centroids."""
        centroids = state[0].shape[1] * group.key_bytes
        read: Tensor = keys * (self.parts * self.bits / 8) + centroids
        return read

    def _parts(self, vectors: Tensor) -> Tensor:
        """The parts of vectors (vectors, channels), as `torch.tensor_split` cuts them, with a zero
        where one is shorter than the others: (parts, vectors, channels of a part)."""
        parts = vectors.tensor_split(self.parts, dim=-1)
        widest = parts[0].shape[-1]
        if parts[-1].shape[-1] < widest:
            parts = tuple(pad(part, (0, widest - part.shape[-1])) for part in parts)
        return torch.stack(parts)
