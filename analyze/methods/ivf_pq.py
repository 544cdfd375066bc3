"""Inverted lists of product-quantised keys, by faiss."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from retrace.analyze.methods.ivf import InvertedLists
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class IVFPQ(InvertedLists):
    """As `ivf`, each key's difference from its centroid held as codes of its parts.

    The best `rerank` times k by their codes are scored in full, and of these the best k are
    attended. A part is a whole number of channels, and a code has no more values than there are
    keys to fit them to: where that does not come out, there are fewer parts, and fewer bits.
    """

    source: ClassVar[str] = "Jegou, Douze and Schmid (TPAMI 2011); faiss IndexIVFPQ"

    m: int = field(default=16, metadata={"help": "parts of a key"})
    bits: int = field(default=8, metadata={"help": "bits of a part's code"})
    rerank: int = field(default=4, metadata={"help": "keys scored in full, over k"})

    def index(self, lists: int, keys: int, channels: int) -> Any:
        """Lists of codes."""
        faiss = self.library()
        parts, bits = math.gcd(self.m, channels), max(1, min(self.bits, int(math.log2(keys))))
        coarse, product = faiss.IndexFlatIP(channels), faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexIVFPQ(coarse, channels, lists, parts, bits, product)
        index.pq.cp.min_points_per_centroid = 1
        return index

    def search(self, state: Any, queries: Tensor, k: int) -> Tensor:
        """The best of the lists searched by their codes, `rerank` times k."""
        found = super().search(state, queries, k * self.rerank)
        state["scored"] = (found >= 0).sum(dim=(0, -1)) if self.rerank > 1 else 0
        return found

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The centroids, the codes of the lists that each head of the group searches, and the keys
        that are scored in full."""
        index = state["index"]
        values = 2**index.pq.nbits * group.key_bytes
        codes = state["searched"] * index.code_size
        full = state["scored"] * group.key_bytes
        read: Tensor = index.nlist * group.key_bytes + values + codes + full
        return read
