"""A method for retrace: scores from some channels of each key."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from retrace.analyze import HeadGroup, Past, ScoreMethod


@dataclass(frozen=True, kw_only=True)
class MyMethod(ScoreMethod):
    """Keys by the product with the query over the first channels alone.

    Say here what it does, and where it comes from.
    """

    source: ClassVar[str] = "examples/retrace-mymethod"

    channels: int = field(default=16, metadata={"help": "channels that are read of every key"})

    def build(self, past: Past) -> Any:
        """The first channels of each key (keys, channels)."""
        return past.keys[:, : self.channels]

    def scores(self, state: Any, queries: Tensor, positions: Tensor) -> Tensor:
        """Products over those channels (group, queries, keys)."""
        products: Tensor = queries[..., : self.channels] @ state[: int(positions[-1]) + 1].T
        return products

    def aux_bytes(self, state: Any, keys: Tensor, group: HeadGroup) -> Tensor:
        """Those channels of every key that the query sees."""
        return keys * state.shape[1] * group.itemsize
