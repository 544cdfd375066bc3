"""A unit as a cache in few bits gives its keys and values back."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from retrace.analyze.caches.formats import Format
from retrace.analyze.methods.options.cache import Cache
from retrace.analyze.units.unit import HeadGroup, Unit
from retrace.traces import RetraceError

Name = Literal["keys", "values"]


def seen_through(unit: Unit, cache: Cache, at: int) -> Unit:
    """The unit as a method on a cache sees it while it answers the query at position `at`, its
    neighbours too: rounded, but for the newest tokens where the cache still has those in full.

    Raises:
        RetraceError: the cache cannot hold keys or values of this layer.
    """
    rules = unit.group.rules
    if rules.cached_bytes is not None:
        raise RetraceError(
            f"cache={cache}: layer {unit.group.layer} caches one vector of a token for all heads, "
            "from which keys and values are made: what rounding it does is not known from those."
        )
    return replace(
        unit,
        keys=_shown(unit, "keys", cache.keys, at),
        values=_shown(unit, "values", cache.values, at),
        neighbours=unit.neighbours
        and unit.neighbours.changed(lambda other: seen_through(other, cache, at)),
        dtype=torch.float32,
    )


def rounded(unit: Unit, name: Name, held: Format) -> Tensor:
    """Keys or values of a unit (whole groups of tokens, channels) as a format gives them back;
    computed once."""
    vectors: Tensor = getattr(unit, name)
    known = f"{name} in {held}"
    if known not in unit.shared:
        held.check(vectors.shape[-1])
        unit.shared[known] = held.rounded(vectors)
    found: Tensor = unit.shared[known]
    return found


def _shown(unit: Unit, name: Name, held: Format, at: int) -> Tensor:
    """What a query at a position finds of keys or values."""
    found = rounded(unit, name, held)
    if held.step is None:
        return found
    first = int(held.first_full(torch.tensor(at)))
    return torch.cat([found[:first], getattr(unit, name)[first:]])


@dataclass(frozen=True)
class Priced(HeadGroup):
    """A kv head whose keys and values take other bytes than in full."""

    bytes_of_key: float = 0.0
    bytes_of_value: float = 0.0

    @property
    def key_bytes(self) -> float:
        """Bytes of one key."""
        return self.bytes_of_key

    @property
    def value_bytes(self) -> float:
        """Bytes of one value."""
        return self.bytes_of_value

    @classmethod
    def of(cls, group: HeadGroup, keys: float, values: float) -> "Priced":
        """A group, at so many bytes of a key and a value."""
        own = (group.layer, group.sequence, group.kv_head, group.rules, group.itemsize)
        return cls(*own, keys, values)
