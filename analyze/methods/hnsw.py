"""A hierarchical navigable small-world graph, by faiss."""

from dataclasses import dataclass, field
from threading import Lock
from typing import Any, ClassVar

from torch import Tensor

from retrace.analyze.methods.base import SearchMethod
from retrace.analyze.methods.toolkit.vector_indexes import answers, rows
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup

_COUNTING = Lock()
"""faiss counts for all threads together."""


@dataclass(frozen=True, kw_only=True)
class HNSW(SearchMethod):
    """Beam search by inner product over a graph of the keys; each query head searches for itself.

    Keys join the graph in order of position, as faiss adds them, so that a query only ever meets
    keys before it. The beam is `ef` wide, or k where that is more. faiss counts the keys that a
    search compares the query with; their bytes are the method's cost.
    """

    source: ClassVar[str] = "arXiv:1603.09320 (HNSW); faiss IndexHNSWFlat"
    extra: ClassVar[str | None] = "faiss"
    incremental: ClassVar[bool] = True

    m: int = field(default=32, metadata={"help": "links of a key in the graph"})
    ef_construction: int = field(default=40, metadata={"help": "beam width when keys are added"})
    ef: int = field(default=64, metadata={"help": "beam width of a search"})

    def build(self, past: Past) -> Any:
        """A graph of the keys, and what its searches have cost."""
        faiss = self.library()
        index = faiss.IndexHNSWFlat(past.keys.shape[1], self.m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.ef_construction
        return self.extend({"index": index, "compared": 0.0}, past)

    def extend(self, state: Any, new: Past) -> Any:
        """Add the keys to the graph, in order."""
        state["index"].add(rows(new.keys))
        return state

    def search(self, state: Any, queries: Tensor, k: int) -> Tensor:
        """The best k that a beam search meets."""
        faiss = self.library()
        index, wanted = state["index"], min(k, state["index"].ntotal)
        parameters = faiss.SearchParametersHNSW(efSearch=max(self.ef, k))
        with _COUNTING:
            faiss.cvar.hnsw_stats.reset()
            found = index.search(rows(queries), wanted, params=parameters)[1]
            compared = faiss.cvar.hnsw_stats.ndis
        state["compared"] = compared / max(1, queries.shape[1])  # by the whole group
        return answers(found, queries)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The keys that a search compared with, for every head of the group, and their links."""
        links = 2 * self.m * 4  # the lowest level has 2 m links of four bytes each
        return float(state["compared"] * (group.key_bytes + links))
