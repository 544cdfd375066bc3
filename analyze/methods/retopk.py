"""ReTopK: the best of what the most similar earlier queries selected."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrace.analyze.compiled import compiled
from retrace.analyze.methods.base import ScoreMethod
from retrace.analyze.methods.toolkit.graphs import dot
from retrace.analyze.methods.toolkit.history import check_history, directions
from retrace.analyze.methods.toolkit.partial_attention import logits_at
from retrace.analyze.units.attention import first_visible
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import RetraceError

MOST = 64
"""Keys that are selected where no budget is named."""
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class Selected(NamedTuple):
    """What each query of a sequence selects under one budget."""

    ids: Tensor
    """(group, queries, k) int32, -1 where there are fewer."""
    read: Tensor
    """Distinct keys that the group reads to select (queries,)."""
    compared: Tensor
    """Earlier queries that each head compares its query with (queries,)."""


@dataclass(frozen=True, kw_only=True)
class History:
    """A sequence, and what its queries selected."""

    past: Past
    by_budget: dict[int, Selected] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ReTopK(ScoreMethod):
    """Each head ranks by exact score what its `alike` most similar earlier queries selected, and
    the `recent` last keys. It keeps what its last `held` queries selected.

    A query ranks all keys where none of those held reaches the cosine `similarity`, and where
    `refresh` queries have passed since one did. Selections are used to find keys alone: scores,
    weights and outputs are the query's own, and no key is dropped. The paper was read in abstract:
    it names the parts, and the numbers here are chosen, not published. It begins where a query
    sees more keys than the budget; a budget of all is exact. `cache`, and layers whose heads share
    one cache, are refused, since each query reads other keys of it to select.
    """

    source: ClassVar[str] = "arXiv:2607.27692 (ReTopK), abstract"
    holds_keys: ClassVar[bool | None] = False
    in_turn: ClassVar[bool] = True

    held: int = field(default=64, metadata={"help": "earlier queries that are held"})
    alike: int = field(default=4, metadata={"help": "of these, whose selections are ranked"})
    recent: int = field(default=64, metadata={"help": "last keys that are ranked"})
    similarity: float = field(default=0.5, metadata={"help": "cosine below which all are ranked"})
    refresh: int = field(default=32, metadata={"help": "queries until all are ranked again"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache is not None:
            raise RetraceError(
                f"cache={self.cache}: which keys are read of it to select is not told in few bits."
            )

    def at(self, k: int) -> Self:
        """What is selected follows from what queries under the same budget selected before."""
        parameters = {f.name: getattr(self, f.name) for f in fields(self)}
        return cast(Self, _Within(**parameters, most=k))

    def build(self, past: Past) -> Any:
        """The queries, and under each budget what they select: of each by itself and earlier ones
        alone."""
        check_history(past)
        return History(past=past)

    def scores(self, state: History, queries: Tensor, positions: Tensor) -> Tensor:
        """Exact logits of what each query selects; heads that agree by a sum agree on what all of
        them select."""
        past = state.past
        ids = self._selected(state).ids[:, positions - past.query_positions[0]].long()
        if len(queries) < len(ids):  # a mean query: of what any head of the group selects
            ids = ids.movedim(0, -2).flatten(-2)[None]
        end = int(positions[-1]) + 1
        found = logits_at(queries, past.keys, ids, past.group.rules)
        scores = queries.new_full((*queries.shape[:2], end + 1), -torch.inf)
        return scores.scatter_(-1, ids.masked_fill(ids < 0, end), found)[..., :end]

    def aux_bytes_at(
        self, state: History, positions: Tensor, keys: Tensor, group: HeadGroup
    ) -> Tensor | float:
        """The distinct keys that the group's heads rank, of which the selected count again; and the
        queries that each head compares its own with."""
        rows = positions - state.past.query_positions[0]
        selected = self._selected(state)
        compared = selected.compared[rows] * group.rules.group
        return (selected.read[rows] + compared) * group.key_bytes

    def _selected(self, state: History) -> Selected:
        """What all queries select, found once for each budget."""
        k = self._keys
        if k not in state.by_budget:
            past = state.past
            positions = past.query_positions
            on_cpu = [t.cpu().contiguous().numpy() for t in (past.queries, past.keys, positions)]
            found = _walk(
                *on_cpu,
                directions(past.queries).cpu().contiguous().numpy(),
                first_visible(positions, past.group.rules).cpu().numpy(),
                k,
                (self.held, self.alike, self.recent, self.refresh),
                self.similarity,
            )
            tensors = (torch.from_numpy(array).to(positions.device) for array in found)
            state.by_budget[k] = Selected(*tensors)
        return state.by_budget[k]

    @property
    def _keys(self) -> int:
        """How many each query selects."""
        return MOST


@dataclass(frozen=True, kw_only=True)
class _Within(ReTopK):
    """The same under one budget."""

    most: int

    def at(self, k: int) -> Self:
        return self

    @property
    def _keys(self) -> int:
        return self.most


@compiled
def _walk(
    queries: Floats,
    keys: Floats,
    positions: Ids,
    directions: Floats,
    oldest: Ids,
    k: int,
    sizes: tuple[int, int, int, int],
    similarity: float,
) -> tuple[NDArray[np.int32], Ids, Ids]:
    """Query by query what each head selects of keys (keys, channels), how many distinct keys all
    heads rank and how many earlier queries each of them is compared with."""
    held, alike, recent, refresh = sizes
    group, count, _ = queries.shape
    selected = np.full((group, count, k), -1, np.int32)
    read, compared = np.zeros(count, np.int64), np.zeros(count, np.int64)
    last_all = np.full(group, -1, np.int64)
    first = 0  # of the queries that selected among more keys than the budget
    candidate = np.full(len(keys), -1, np.int64)
    by_group = np.full(len(keys), -1, np.int64)
    cosines = np.empty(held, np.float64)
    ids = np.empty(len(keys), np.int64)
    for i in range(count):
        start, stop = oldest[i], positions[i] + 1
        if stop - start <= k:
            for h in range(group):
                for j in range(start, stop):
                    selected[h, i, j - start] = j
            first = i + 1
            last_all[:] = -1
            continue
        since = max(first, i - held)
        compared[i] = i - since
        for h in range(group):
            turn = i * group + h
            found, most = 0, -2.0
            for e in range(since, i):
                cosines[e - since] = dot(directions[h, e], directions[h, i])
                most = max(most, cosines[e - since])
            if last_all[h] < 0 or i - last_all[h] >= refresh or most < similarity:
                last_all[h] = i
                for j in range(start, stop):
                    ids[found] = j
                    found += 1
            else:
                for _ in range(min(alike, i - since)):
                    # Of equals the later query.
                    e = i - 1 - since - int(np.argmax(cosines[: i - since][::-1]))
                    cosines[e] = -np.inf
                    for j in selected[h, since + e]:
                        if j >= start and candidate[j] != turn:
                            candidate[j] = turn
                            ids[found] = j
                            found += 1
                for j in range(max(start, stop - recent), stop):
                    if candidate[j] != turn:
                        candidate[j] = turn
                        ids[found] = j
                        found += 1
            ranked = np.sort(ids[:found])
            scores = np.empty(found, np.float32)
            for n in range(found):
                scores[n] = dot(queries[h, i], keys[ranked[n]])
                if by_group[ranked[n]] != i:
                    by_group[ranked[n]] = i
                    read[i] += 1
            best = np.argsort(-scores, kind="mergesort")[:k]
            for n in range(len(best)):
                selected[h, i, n] = ranked[best[n]]
    return selected, read, compared
