"""What a method is: one small frozen dataclass, at the lowest of three levels that fits it.

1. `ScoreMethod` scores keys (or pages of keys); pooling over the group, always-kept keys, budgets,
   causality, output and metrics are the engine's.
2. `SearchMethod` returns ranked key ids, as an index does.
3. `AttendMethod` computes the output itself.

The fields of the dataclass are the method's hyperparameters, with the published defaults; each of
them can be set in a spec (`quest:page=32`). A method keeps nothing between calls: what `build`
returns is handed back to every later call as `state`.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from retrace.analyze.keep import Keep
from retrace.analyze.pooling import MEAN_QUERY, POOLINGS
from retrace.traces import LayerRules, RetraceError

POOL = {"help": "how the group's heads agree on one selection", "choices": (*POOLINGS, MEAN_QUERY)}
KEEP = {"help": "keys always attended, within the budget: sink:4+recent:64"}
OUTPUT = {
    "help": "renorm, or mean-fill: the mean value in place of what was left out",
    "choices": ("renorm", "mean-fill"),
}


@dataclass(frozen=True)
class HeadGroup:
    """The kv head that a state is built for, and the group of query heads that share it."""

    layer: int
    sequence: int
    kv_head: int
    rules: LayerRules
    itemsize: int
    """Bytes of one stored element of the trace."""

    @property
    def key_bytes(self) -> int:
        """Bytes of one key."""
        return self.rules.key_dim * self.itemsize

    @property
    def value_bytes(self) -> int:
        """Bytes of one value."""
        return self.rules.value_dim * self.itemsize


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to find the keys that matter. Not used directly: see the three levels below."""

    source: ClassVar[str] = ""
    """The paper or library that the method comes from."""
    extra: ClassVar[str | None] = None
    """Name of the optional dependency that it needs, as in `retrace-attention[faiss]`."""
    fitted: ClassVar[bool] = False
    """Whether `build` fits to the keys it is given (a basis, a graph), rather than keeping one
    quantity per key. A fitted state is only ever built from keys that come before the query."""

    holds_keys: ClassVar[bool] = False
    """Whether finding reads every key in full, so that the selected ones are there already."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, least = getattr(self, f.name), f.metadata.get("least", 1)
            if type(value) is int and value < least:
                raise RetraceError(f"{f.name}={value}: expected at least {least}.")
            choices = f.metadata.get("choices", ())
            if choices and value not in choices:
                raise RetraceError(f"{f.name}={value!r}: expected one of {', '.join(choices)}.")

    def build(self, keys: Tensor, values: Tensor, group: HeadGroup) -> Any:
        """The state for keys (keys, channels) and values (keys, value channels), float32.

        A method that is not fitted is handed a whole sequence, and each query's future is hidden
        when its scores come back: what it keeps of a key must depend on that key and earlier ones.
        """
        return keys

    def extend(self, state: Any, keys: Tensor, values: Tensor, group: HeadGroup) -> Any:
        """A fitted state with later keys added, by the method's own update rule."""
        raise NotImplementedError(f"{type(self).__name__} is fitted and must define extend().")

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """Bytes of the state that a query's whole group reads, for the number of keys that each
        query sees (queries,)."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class ScoreMethod(Method):
    """A method that scores every visible key, or every page of keys."""

    pool: str = field(default="none", metadata=POOL)
    keep: Keep = field(default=Keep(), metadata=KEEP)
    output: str = field(default="renorm", metadata=OUTPUT)

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """Estimated scores (group, queries, units) for queries (group, queries, channels).

        Units are keys, or pages where `unit_size` is more than 1, from the sequence's first to at
        least the one at the last of `positions` (queries,), which ascend. Higher is better. Units
        that a query does not see may hold anything but NaN.
        """
        raise NotImplementedError

    @property
    def unit_size(self) -> int:
        """Keys in one unit of selection: 1, or a page's."""
        return 1

    def units(self, k: int) -> int:
        """How many units a budget of k keys buys."""
        return max(1, k // self.unit_size)


@dataclass(frozen=True, kw_only=True)
class SearchMethod(Method):
    """A method that answers with key ids, as a vector index does.

    Its state holds keys up to some position; the few that came since are searched exactly.
    """

    fitted: ClassVar[bool] = True
    incremental: ClassVar[bool] = False
    """Whether adding keys run by run gives what building from all of them would: such an index
    only grows and is never rebuilt."""

    step: int = field(
        default=32,
        metadata={"help": "keys that join the index together; those since are searched exactly"},
    )

    def search(self, state: Any, queries: Tensor, k: int) -> Tensor:
        """Ids (group, queries, k) int64 of retrieved keys, best first, -1 where there are fewer.

        `queries` (group, queries, channels) are scaled as the layer scales them.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AttendMethod(Method):
    """A method that computes the attention output itself."""

    def attend(
        self, state: Any, queries: Tensor, positions: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """The output (group, queries, value channels) and the ids (group, queries, any) int64 of
        the keys attended, best first, -1 where there are fewer, for queries
        (group, queries, channels) at `positions` (queries,) and a budget of k keys."""
        raise NotImplementedError
