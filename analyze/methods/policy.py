"""Heads that see sinks and recent keys alone, beside others that any method answers."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from retrace.analyze.methods.base import AttendMethod, Method, PolicyMethod, ScoreMethod
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.options.pooling import LAYER
from retrace.analyze.methods.registry import check_complete, made_inside
from retrace.analyze.units.past import Past
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import RetraceError


@dataclass(frozen=True, kw_only=True)
class _Streaming(ScoreMethod):
    """The keys that `keep` names, whatever the budget."""

    holds_keys: ClassVar[bool | None] = False

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """No others."""
        none = queries.new_full((), -torch.inf)
        return none.expand(*queries.shape[:2], int(positions[-1]) + 1)


@dataclass(frozen=True)
class Streams:
    """Whether a kv head streams, and the state of the method that answers it."""

    streams: bool
    own: Any


@dataclass(frozen=True, kw_only=True)
class StreamingPolicy(PolicyMethod):
    """A policy by which some kv heads see `sink` and `recent` keys alone, as many under every
    budget, and `of` answers the others."""

    of: str = field(
        default="dense",
        metadata={"help": "what the others see, as name:parameter=value+parameter=value"},
    )
    sink: int = field(
        default=4, metadata={"help": "first keys that streaming heads see", "least": 0}
    )
    recent: int = field(default=1024, metadata={"help": "last keys that they see"})

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = made_inside(self.of)
        if inner.cache is not None:
            raise RetraceError(
                f"of={self.of}: name the cache beside it, as in of=quest,cache={inner.cache}."
            )
        if (why := _unfit(inner)) is not None:
            raise RetraceError(f"of={self.of}: it {why}, and cannot be left some heads alone.")
        check_complete(self.inner, self.of)

    @cached_property
    def inner(self) -> Method:
        """The method that answers heads which do not stream, on the policy's cache.

        Raises:
            RetraceError: there is none of the name.
        """
        return replace(made_inside(self.of), cache=self.cache)

    @property
    def fitted(self) -> bool:
        """Whether that method is."""
        return self.inner.fitted

    @property
    def charged(self) -> bool:
        """Whether that method says what finding its keys reads."""
        return self.inner.charged

    def streams(self, past: Past) -> bool:
        """Whether a kv head streams from the end of a past on."""
        raise NotImplementedError

    def build(self, past: Past) -> Streams:
        """Whether the head streams, and the state of the method that answers it."""
        streams = self.streams(past)
        return Streams(streams, past if streams else self.inner.build(past))

    def extend(self, state: Streams, new: Past) -> Streams:
        """By that method's own rule; one that keeps a quantity per key is handed all keys."""
        if state.streams:
            return state
        if self.inner.fitted:
            return Streams(False, self.inner.extend(state.own, new))
        return Streams(False, self.inner.build(new.whole))

    def answering(self, state: Streams | None) -> tuple[Method, Any]:
        """Sinks and recent keys, or the method of the others."""
        if state is None:
            return self.inner, None
        streaming = _Streaming(keep=Keep(self.sink, self.recent), cache=self.cache)
        return (streaming if state.streams else self.inner), state.own

    def aux_bytes(self, state: Streams, keys: Tensor, group: HeadGroup) -> Tensor | float:
        """What `of` reads, in heads that do not stream; nothing in others."""
        return 0.0 if state.streams else self.inner.aux_bytes(state.own, keys, group)


def _unfit(method: Method) -> str | None:
    """Why a method cannot answer some heads alone; None if it can."""
    if not isinstance(method, ScoreMethod | AttendMethod):
        return "neither scores keys nor computes an output"
    if method.calibrated:
        return "learns from other sequences"
    if method.across_layers:
        return "looks at other layers"
    if method.in_turn:
        return "answers queries by those before them"
    if isinstance(method, ScoreMethod):
        if method.keeps_new:
            return "evicts keys"
        if method.pool.startswith(LAYER):
            return "selects for all heads of a layer together"
    return None
