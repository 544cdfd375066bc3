"""All keys searched, by faiss: what an index gives up to be faster."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retrace.analyze.methods.base import SearchMethod
from retrace.analyze.methods.toolkit.vector_indexes import answers, rows
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup


@dataclass(frozen=True, kw_only=True)
class Flat(SearchMethod):
    """Exhaustive search by inner product; each query head searches for itself.

    What public ports of RetrievalAttention (arXiv:2409.10516) search in place of its graph, which
    was not released. Keys join in order of position.
    """

    source: ClassVar[str] = "faiss IndexFlatIP; microsoft/MInference"
    extra: ClassVar[str | None] = "faiss"
    incremental: ClassVar[bool] = True
    complete: ClassVar[bool] = True
    holds_keys: ClassVar[bool | None] = True

    def build(self, past: Past) -> Any:
        """The keys."""
        return self.extend(self.library().IndexFlatIP(past.keys.shape[1]), past)

    def extend(self, state: Any, new: Past) -> Any:
        """Add the keys."""
        state.add(rows(new.keys))
        return state

    def search(self, state: Any, queries: Tensor, k: int) -> Tensor:
        """The k of largest product."""
        return answers(state.search(rows(queries), min(k, state.ntotal))[1], queries)

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """All keys in the index."""
        return float(state.ntotal * group.key_bytes)
