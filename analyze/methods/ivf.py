"""Inverted lists of keys, by faiss."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import SearchMethod
from retrace.analyze.methods.toolkit.vector_indexes import answers, rows
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class InvertedLists(SearchMethod):
    """What indexes of faiss with inverted lists share; not used directly."""

    extra: ClassVar[str | None] = "faiss"

    nlist: int = field(
        default=0, metadata={"help": "lists; 0 takes 4 for the root of the keys", "least": 0}
    )
    nprobe: int = field(default=8, metadata={"help": "lists that a query searches"})

    def index(self, lists: int, keys: int, channels: int) -> Any:
        """An untrained index of faiss for so many lists and keys."""
        raise NotImplementedError

    def build(self, past: Past) -> Any:
        """Lists of the keys, by centroids fitted to them."""
        keys = rows(past.keys)
        lists = min(len(keys), self.nlist or int(4 * len(keys) ** 0.5))
        index = self.index(lists, *keys.shape)
        index.cp.min_points_per_centroid = 1  # no warning of few keys: they are all there is
        index.train(keys)
        return self.extend({"index": index}, past)

    def extend(self, state: Any, new: Past) -> Any:
        """Add the keys to the lists of the nearest centroids."""
        state["index"].add(rows(new.keys))
        return state

    def search(self, state: Any, queries: Tensor, k: int) -> Tensor:
        """The best k of the lists searched, -1 where they hold fewer."""
        index, vectors = state["index"], rows(queries)
        index.nprobe = min(self.nprobe, index.nlist)
        probed = torch.from_numpy(index.quantizer.search(vectors, index.nprobe)[1])
        sizes = torch.tensor([index.invlists.list_size(i) for i in range(index.nlist)])
        held = sizes[probed].sum(dim=-1).view(queries.shape[:2])
        state["searched"] = held.sum(dim=0).to(queries.device)
        return answers(index.search(vectors, min(k, index.ntotal))[1], queries)


@dataclass(frozen=True, kw_only=True)
class IVF(InvertedLists):
    """Keys in lists by their nearest centroid; a query searches the lists of the centroids nearest
    to it, all by inner product.

    Each query head searches for itself. Centroids are fitted to the keys that are there when the
    index is built, and stay; later keys join the lists. Lists hold keys in full, or with
    `codes=sq8` a byte a channel.
    """

    source: ClassVar[str] = "faiss IndexIVFFlat and IndexIVFScalarQuantizer"

    codes: str = field(
        default="flat", metadata={"help": "what the lists hold", "choices": ("flat", "sq8")}
    )

    def index(self, lists: int, keys: int, channels: int) -> Any:
        """Lists of whole keys or of a byte a channel."""
        faiss = self.library()
        coarse, product = faiss.IndexFlatIP(channels), faiss.METRIC_INNER_PRODUCT
        if self.codes == "flat":
            return faiss.IndexIVFFlat(coarse, channels, lists, product)
        kind = faiss.ScalarQuantizer.QT_8bit
        return faiss.IndexIVFScalarQuantizer(coarse, channels, lists, kind, product)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The centroids, and the lists that each head of the group searches."""
        index = state["index"]
        each = group.key_bytes if self.codes == "flat" else index.code_size
        read: Tensor = index.nlist * group.key_bytes + state["searched"] * each
        return read
