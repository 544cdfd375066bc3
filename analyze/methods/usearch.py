"""A hierarchical navigable small-world graph, by usearch."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from retrace.analyze.methods.base import SearchMethod
from retrace.analyze.methods.toolkit.vector_indexes import answers, rows
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class USearch(SearchMethod):
    """Beam search by inner product over a graph of the keys; each query head searches for itself.

    Keys join the graph in order of position. The beam is `ef` wide, or k where that is more. The
    library counts the keys that searches compare with: their mean over queries is the cost.
    """

    source: ClassVar[str] = "arXiv:1603.09320 (HNSW); unum-cloud/usearch"
    extra: ClassVar[str | None] = "usearch"
    incremental: ClassVar[bool] = True

    m: int = field(default=16, metadata={"help": "links of a key in the graph"})
    ef_construction: int = field(default=128, metadata={"help": "beam width when keys are added"})
    ef: int = field(default=64, metadata={"help": "beam width of a search"})
    dtype: str = field(
        default="f32",
        metadata={"help": "what the graph holds keys in", "choices": ("f32", "f16", "bf16", "i8")},
    )

    def build(self, past: Past) -> Any:
        """A graph of the keys, and what its last search cost."""
        index = self.library("usearch.index").Index(
            ndim=past.keys.shape[1],
            metric="ip",
            dtype=self.dtype,
            connectivity=self.m,
            expansion_add=self.ef_construction,
            expansion_search=self.ef,
        )
        return self.extend({"index": index, "compared": 0.0}, past)

    def extend(self, state: Any, new: Past) -> Any:
        """Add the keys to the graph, in order, on one thread: so that it is the same each time."""
        state["index"].add(np.arange(new.start, new.end), rows(new.keys), threads=1)
        return state

    def search(self, state: Any, queries: Tensor, k: int) -> Tensor:
        """The best k that a beam search meets."""
        index = state["index"]
        index.expansion_search = max(self.ef, k)
        wanted = min(k, len(index))
        vectors = rows(queries)
        found = index.search(vectors, wanted, threads=1)
        state["compared"] = found.computed_distances / queries.shape[1]  # by the whole group
        # One query has keys (found,), several have keys (queries, wanted) and how many each found.
        ids = np.full((len(vectors), wanted), -1)
        counts = np.reshape(getattr(found, "counts", len(found.keys)), (-1, 1))
        listed = np.arange(wanted) < counts
        ids[listed] = np.reshape(found.keys, (len(vectors), -1))[listed[:, : found.keys.shape[-1]]]
        return answers(ids, queries)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The keys that a search compared with, for every head of the group, and their links."""
        links = 2 * self.m * 4
        return float(state["compared"] * (group.key_bytes + links))
