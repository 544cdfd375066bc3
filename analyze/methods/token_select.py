"""TokenSelect: the keys that were selected last, as long as queries stay alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrace.analyze.compiled import compiled
from retrace.analyze.methods.base import KEEP, POOL, LearnedLike, ScoreMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.options.pooling import LAYER
from retrace.analyze.methods.registry import made_inside
from retrace.analyze.methods.toolkit.history import check_history, directions
from retrace.analyze.units.attention import first_visible
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules, RetraceError


@dataclass(frozen=True, kw_only=True)
class History:
    """A sequence's queries, and which earlier one's selection each uses."""

    past: Past
    own: Any
    """The state of the method whose selections are used again."""
    directions: Tensor
    """Of the queries of all heads that select together (queries, channels)."""
    chosen_at: dict[int, Tensor] = field(default_factory=dict)
    """By budget: the position of the query whose selection each uses (queries,)."""


@dataclass(frozen=True, kw_only=True)
class TokenSelect(ScoreMethod):
    """Selects by another method, `of`, and uses the selection again for the queries that follow, as
    long as they are alike: the cosine with the query that selected last is at least `similarity`.
    Sinks and recent keys are those of each query.

    Queries are compared before position encoding, those of all heads of the layer as one vector,
    or of the group where `pool` is not of the layer. Like the authors' code it begins where a query
    sees more keys than the budget, and what is between a selection and a later query's recent keys
    is missed until the next; of a layer with a window the next best take the place of selected keys
    that it leaves. That code keeps 128 sinks and 512 recent keys of 2,688, here at most
    5 and 20 in a hundred and the query's own key. It scores keys as if all stood 512 before the
    query; here `of` scores them where they are. As released it has reuse switched off, which is
    `similarity=2` here. Layers whose heads share one cache, and `cache`, are refused: a query that
    selects reads keys of the cache, and one that does not reads none.
    """

    source: ClassVar[str] = "arXiv:2411.02886 (TokenSelect), section 3; pzs19/TokenSelect"
    holds_keys: ClassVar[bool | None] = False
    in_turn: ClassVar[bool] = True

    of: str = field(
        default="exact",
        metadata={"help": "the method, as name:parameter=value+parameter=value"},
    )
    similarity: float = field(default=0.9, metadata={"help": "cosine from which on queries reuse"})
    pool: str = field(default="layer-sum-softmax", metadata=POOL)
    keep: Keep = field(
        default=Keep(sink=128, sink_most=0.05, recent=512, recent_most=0.2), metadata=KEEP
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache is not None:
            raise RetraceError(
                f"cache={self.cache}: which queries read it to select is not told in few bits."
            )
        if self.inner.fitted or self.inner.across_layers:
            what = "is fitted to earlier keys" if self.inner.fitted else "looks at other layers"
            raise RetraceError(f"of={self.of}: it {what}, and its selections cannot be reused.")

    @cached_property
    def inner(self) -> ScoreMethod:
        """The method that selects.

        Raises:
            RetraceError: there is none of the name, or it scores no keys.
        """
        method = made_inside(self.of)
        if not isinstance(method, ScoreMethod):
            raise RetraceError(f"of={self.of}: it scores no keys.")
        return method

    @property
    def calibrated(self) -> bool:
        """Whether the method that selects is."""
        return self.inner.calibrated

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """What the method that selects learns."""
        return self.inner.calibrate(pasts)

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike | None:
        """The same."""
        return self.inner.learned_like(rules, layers)

    @property
    def unit_size(self) -> int:
        """That of the method that selects."""
        return self.inner.unit_size

    def units(self, k: int) -> int:
        """As many as the method that selects takes."""
        return self.inner.units(k)

    def at(self, k: int) -> Self:
        """With the keys that are kept under this budget, the query's own among them."""
        sink, recent = self.keep.at(k)
        parameters = {f.name: getattr(self, f.name) for f in fields(self)}
        parameters["keep"] = Keep(sink, max(1, recent))
        return cast(Self, _Within(**parameters, most=k))

    def build(self, past: Past) -> Any:
        """The other method's state, and the queries, of which each is compared with earlier ones
        alone."""
        check_history(past)
        heads = past.heads if self.pool.startswith(LAYER) else (past,)
        asked = torch.cat([head.queries_before_rotation for head in heads])
        together = asked.transpose(0, 1).flatten(1)
        return History(past=past, own=self.inner.build(past), directions=directions(together))

    def scores(self, state: History, queries: Tensor, positions: Tensor) -> Tensor:
        """Those of the query that selected, of the keys that it did not keep anyway."""
        at = self._chosen_at(state, positions)
        earlier = state.past.queries_at(at, len(queries))
        asked = torch.where((at == positions)[:, None], queries, earlier)
        scores = self.inner.scores(state.own, asked, at)
        size = self.unit_size
        missing = -(-(int(positions[-1]) + 1) // size) - scores.shape[-1]
        scores = torch.nn.functional.pad(scores, (0, max(0, missing)), value=-torch.inf)
        first = torch.arange(scores.shape[-1], device=at.device) * size
        return scores.masked_fill(first > (at - self.keep.recent)[:, None], -torch.inf)

    def aux_bytes_at(
        self, state: History, positions: Tensor, keys: Tensor, group: HeadGroup
    ) -> Tensor | float:
        """What the method reads that selects, where it does; and each time the queries of the group
        that selected last. The selected keys count again, as they are read anew."""
        selects = self._chosen_at(state, positions) == positions
        read = torch.as_tensor(self.inner.aux_bytes_at(state.own, positions, keys, group))
        return torch.where(selects, read, 0) + group.rules.group * group.key_bytes

    def _chosen_at(self, state: History, positions: Tensor) -> Tensor:
        """The positions of the queries whose selections those at some positions use."""
        first = state.past.query_positions[0]
        return self._chain(state)[positions - first]

    def _chain(self, state: History) -> Tensor:
        """The same for all queries, found once for each budget."""
        most = self._most
        if most not in state.chosen_at:
            positions = state.past.query_positions
            oldest = first_visible(positions, state.past.group.rules)
            chain = _follow(
                state.directions.cpu().numpy(),
                positions.cpu().numpy(),
                oldest.cpu().numpy(),
                most,
                self.similarity,
            )
            state.chosen_at[most] = torch.from_numpy(chain).to(positions.device)
        return state.chosen_at[most]

    @property
    def _most(self) -> int:
        """Keys that a query may see and attend all of them."""
        return 0


@dataclass(frozen=True, kw_only=True)
class _Within(TokenSelect):
    """The same under one budget."""

    most: int

    def at(self, k: int) -> Self:
        return self

    @cached_property
    def inner(self) -> ScoreMethod:
        return replace(super().inner, keep=Keep()).at(self.most)

    @property
    def _most(self) -> int:
        return self.most


@compiled
def _follow(
    directions: NDArray[np.float32],
    positions: NDArray[np.int64],
    oldest: NDArray[np.int64],
    most: int,
    similarity: float,
) -> NDArray[np.int64]:
    """For each query the position of the one whose selection it uses: the last that selected, if
    that is in sight and alike, or its own."""
    chain = positions.copy()
    last = -1
    for i in range(len(positions)):
        if positions[i] - oldest[i] + 1 <= most:
            last = -1
            continue
        if last >= 0 and positions[last] >= oldest[i]:
            alike = 0.0
            for c in range(directions.shape[1]):
                alike += np.float64(directions[last, c]) * np.float64(directions[i, c])
            if alike >= similarity:
                chain[i] = positions[last]
                continue
        last = i
    return chain
