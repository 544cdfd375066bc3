"""A hierarchical navigable small-world graph, by hnswlib."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from retrace.analyze.methods.base import SearchMethod
from retrace.analyze.methods.toolkit.vector_indexes import answers, rows
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class HNSWLib(SearchMethod):
    """Beam search by inner product over a graph of the keys; each query head searches for itself.

    Keys join the graph in order of position. The beam is `ef` wide, or k where that is more. The
    library does not tell how many keys a search compares with: the cost is the most that there can
    be on the lowest level, all links of every key in the beam.
    """

    source: ClassVar[str] = "arXiv:1603.09320 (HNSW); nmslib/hnswlib"
    extra: ClassVar[str | None] = "hnswlib"
    incremental: ClassVar[bool] = True

    m: int = field(default=16, metadata={"help": "links of a key in the graph", "least": 2})
    ef_construction: int = field(default=200, metadata={"help": "beam width when keys are added"})
    ef: int = field(default=64, metadata={"help": "beam width of a search"})
    seed: int = field(default=100, metadata={"help": "of the levels of keys", "least": 0})

    def build(self, past: Past) -> Any:
        """A graph of the keys, and how wide the beam of its last search was."""
        index = self.library().Index(space="ip", dim=past.keys.shape[1])
        index.init_index(
            max_elements=1,
            M=self.m,
            ef_construction=self.ef_construction,
            random_seed=self.seed,
        )
        return self.extend({"index": index, "beam": self.ef}, past)

    def extend(self, state: Any, new: Past) -> Any:
        """Add the keys to the graph, in order, on one thread: so that it is the same each time."""
        state["index"].resize_index(new.end)
        state["index"].add_items(rows(new.keys), np.arange(new.start, new.end), num_threads=1)
        return state

    def search(self, state: Any, queries: Tensor, k: int) -> Tensor:
        """The best k that a beam search meets."""
        index = state["index"]
        wanted = min(k, index.element_count)
        state["beam"] = max(self.ef, k)
        index.set_ef(state["beam"])
        try:
            found = index.knn_query(rows(queries), wanted, num_threads=1)[0]
        except RuntimeError:
            # Some beam met fewer, for which the library has no answer: of inner products a graph
            # may fall apart.
            found = np.stack([_as_many_as_there_are(index, q, wanted) for q in rows(queries)])
        return answers(found, queries)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The keys linked to those in the beam, or all, for every head of the group, and links."""
        links = 2 * self.m
        most = min(state["beam"] * links, state["index"].element_count)
        return float(most * group.rules.group * (group.key_bytes + 4 * links))


def _as_many_as_there_are(index: Any, query: Any, most: int) -> Any:
    """The best keys (most,) that a query's beam meets, -1 where these are fewer."""
    found, met = np.full(most, -1, np.int64), 0
    while met < most:
        count = (met + most + 1) // 2
        try:
            found[:count] = index.knn_query(query[None], count, num_threads=1)[0][0]
            met = count
        except RuntimeError:
            most = count - 1
    return found
