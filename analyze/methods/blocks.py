"""Any method that scores keys, pooled to blocks of queries and keys."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import BlockMethod, LearnedLike, ScoreMethod
from retrace.analyze.methods.options.pooling import LAYER, MEAN_QUERY, pool
from retrace.analyze.methods.registry import made_inside
from retrace.analyze.methods.toolkit.blocks import logs, sums
from retrace.analyze.units.attention import visible
from retrace.analyze.units.past import Past
from retrace.traces import LayerRules, RetraceError


@dataclass(frozen=True, kw_only=True)
class Blocks(BlockMethod):
    """A method that scores keys for each query, such as quest, in blocks of queries that share what
    they attend: `blocks:of=quest:page=32+pool=sum` has its parameters after its name, joined by
    `+`.

    A query's scores, taken as logits, are shared out by a softmax over the keys that it sees, those
    of a page alike, and the shares of a block of keys are summed over its queries: what the block
    oracle does with exact scores, `blocks:of=exact`. Its own `keep`, `budget` and `output` are not
    used, since this method has those; a method that is fitted to earlier keys, or that selects by
    other layers or by all heads of its own, is refused. The operations that its scores take are not
    known: counted are those of one product with each key.
    """

    source: ClassVar[str] = "definition"

    of: str = field(
        default="quest", metadata={"help": "the method, as name:parameter=value+parameter=value"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self.inner
        if inner.cache is not None:
            raise RetraceError(
                f"of={self.of}: name the cache beside it, as in of=quest,cache={inner.cache}."
            )
        if inner.fitted or inner.across_layers or inner.pool.startswith(LAYER):
            what = "is fitted to earlier keys" if inner.fitted else "looks at other heads or layers"
            raise RetraceError(f"of={self.of}: it {what}, and cannot be pooled to blocks.")

    @cached_property
    def inner(self) -> ScoreMethod:
        """The method whose scores are pooled.

        Raises:
            RetraceError: there is none of the name, or it scores no keys.
        """
        method = made_inside(self.of)
        if not isinstance(method, ScoreMethod):
            name = self.of.partition(":")[0]
            raise RetraceError(
                f"of={self.of}: {name} scores no keys, so that nothing can be pooled."
            )
        return method

    @property
    def calibrated(self) -> bool:
        """Whether the method is."""
        return self.inner.calibrated

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """What the method learns."""
        return self.inner.calibrate(pasts)

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike | None:
        """The same."""
        return self.inner.learned_like(rules, layers)

    def build(self, past: Past) -> Any:
        """The method's own state, and the layer's rules."""
        return self.inner.build(past), past.group.rules

    def block_scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """log of the sum of the shares of each block."""
        own, rules = state
        inner, end = self.inner, int(positions[-1]) + 1
        heads = len(queries)
        if inner.pool == MEAN_QUERY:
            queries = queries.mean(dim=0, keepdim=True)
        scores = inner.scores(own, queries, positions)
        seen = visible(positions, torch.arange(end, device=positions.device), rules)
        of_keys = scores.repeat_interleave(inner.unit_size, dim=-1)[..., :end]
        of_keys = pool(inner.pool, of_keys.masked_fill(~seen, -torch.inf))
        shares = of_keys.softmax(dim=-1).nan_to_num(0.0).sum(dim=1)
        return logs(sums(shares, self.block)).expand(heads, -1)

    def operations(self, queries: int, keys: int, group: Any) -> float:
        """A product with each key."""
        return float(queries * keys * group.rules.key_dim)
