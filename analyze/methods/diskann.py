"""A navigable graph of long and short links, by DiskANN."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from retrace.analyze.indexes import answers, rows, silenced
from retrace.analyze.methods.base import SearchMethod
from retrace.analyze.past import Past
from retrace.analyze.unit import HeadGroup

LEAST_ROOM = 1024


@dataclass(frozen=True, kw_only=True)
class DiskANN(SearchMethod):
    """Beam search by inner product over a Vamana graph of the keys, in memory; each query head
    searches for itself.

    Keys join the graph in order of position; it has room for a power of two of them and is built
    anew when that is full. The beam is `complexity` wide, or k where that is more. The library does
    not tell how many keys a search compares with: the cost is all links of every key in the beam.
    """

    source: ClassVar[str] = "Jayaram Subramanya et al. (NeurIPS 2019); microsoft/DiskANN"
    extra: ClassVar[str | None] = "diskannpy"
    install: ClassVar[str | None] = "pip install --no-deps diskannpy==0.7.0"
    incremental: ClassVar[bool] = True

    degree: int = field(default=64, metadata={"help": "links of a key in the graph, at most"})
    build_complexity: int = field(default=100, metadata={"help": "beam width when keys are added"})
    complexity: int = field(default=100, metadata={"help": "beam width of a search"})
    alpha: float = field(default=1.2, metadata={"help": "how much longer a link must be to go"})
    occlusion: int = field(default=750, metadata={"help": "candidates for links, at most"})
    saturate: bool = field(default=False, metadata={"help": "fill every key's links"})

    def build(self, past: Past) -> Any:
        """A graph of the keys, and how wide the beam of its last search was."""
        room = LEAST_ROOM
        while room < past.end:
            room *= 2
        with silenced():
            index = self.library().DynamicMemoryIndex(
                distance_metric="mips",
                vector_dtype=np.float32,
                dimensions=past.keys.shape[1],
                max_vectors=room,
                complexity=self.build_complexity,
                graph_degree=self.degree,
                saturate_graph=self.saturate,
                max_occlusion_size=self.occlusion,
                alpha=self.alpha,
                num_threads=1,
                initial_search_complexity=self.complexity,
                search_threads=1,
            )
        return self._add({"index": index, "room": room, "beam": self.complexity}, past)

    def extend(self, state: Any, new: Past) -> Any:
        """Add the keys to the graph, in order, on one thread: so that it is the same each time."""
        return self._add(state, new) if new.end <= state["room"] else self.build(new.whole)

    def search(self, state: Any, queries: Tensor, k: int) -> Tensor:
        """The best k that a beam search meets."""
        wanted = min(k, state["keys"])
        state["beam"] = max(self.complexity, k)
        found = state["index"].batch_search(rows(queries), wanted, state["beam"], 1)
        ids = found.identifiers.astype(np.int64) - 1
        # Where it meets fewer, the library leaves what was in memory.
        return answers(np.where(ids < state["keys"], ids, -1), queries)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """The keys linked to those in the beam, or all, for every head of the group, and links."""
        most = min(state["beam"] * self.degree, state["keys"])
        return float(most * group.rules.group * (group.key_bytes + 4 * self.degree))

    @staticmethod
    def _add(state: Any, new: Past) -> Any:
        ids = np.arange(new.start + 1, new.end + 1, dtype=np.uint32)  # 0 is the library's own
        state["index"].batch_insert(rows(new.keys), ids, num_threads=1)
        state["keys"] = new.end
        return state
