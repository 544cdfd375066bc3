"""What a trace holds: names, axes and the rules of a layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from retrace.traces.bfloat16 import BFLOAT16
from retrace.traces.errors import RetraceError
from retrace.traces.rotation import Rotation, is_number

FORMAT_VERSION = 2
"""The newest that is read. Only a trace whose bundles have several sequences is written as
version 2, so that an earlier retrace asks to be updated; all others are of version 1."""
SMALLEST, LARGEST = (float(n) for n in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
FORMAT_KEY = "retrace_format"

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "float64": np.dtype(np.float64),
}
"""Element types of queries, keys and values: those a model computes in."""

TENSOR_AXES: dict[str, tuple[str, str, str, str]] = {
    "query": ("sequence", "head", "query_position", "channel"),
    "key": ("sequence", "kv_head", "position", "channel"),
    "value": ("sequence", "kv_head", "position", "value_channel"),
    "selected": ("sequence", "choice", "query_position", "kept"),
}
"""Axes of a layer's arrays. Queries have an axis of their own, since not all may be kept; only of a
natively sparse model there is `selected`."""

OUTPUT_PROJECTION = "output_projection"
PROJECTION_AXES = ("hidden", "head", "value_channel")
"""Axes of the array of that name, which a layer may have: the weights W_o that turn its heads'
attention output into what its module returns, hidden = sum of W_o times output over heads and
channels, less a bias. Its group has an attribute `output_projection` too: the path of the module
that they are of, or else `no_output_projection`, why the capture left them out."""

PHASES = {"context": 0, "continuation": 1, "generated": 2}
"""What a position is, by its code in the array `phase` (sequence, position), -1 where padding is.

context: text that is read, be it a document, a prompt or what comes before scored text;
continuation: text that a task scores given its context, such as an answer;
generated: tokens that the model wrote, each read with the keys and values before it in its cache.

A trace that was made before there was such an array is all context."""


@dataclass(frozen=True)
class OutputProjection:
    """The weights that a layer's attention output is multiplied with, as they are stored."""

    module: str
    """Path of what they are the weights of, inside the model."""
    hidden: int
    """How many numbers it gives."""
    read: Callable[[], npt.NDArray[Any]]
    """Gives them (hidden, heads, value channels), in the trace's dtype: layer by layer, since those
    of all are large."""


@dataclass(frozen=True)
class Indexer:
    """How a natively sparse layer chooses the keys that it attends to, out of those it sees."""

    kept: int
    """Keys that it chooses for a query at most."""
    groups: int = 1
    """How many choices there are: one for all heads, or one for each kv head."""
    bytes_per_key: float = 0.0
    """What choosing reads of each key that is seen, as served; 0 where the choice is another's."""
    source: int | None = None
    """The earlier layer whose choice it is, where it makes none of its own."""

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> "Indexer":
        """Read back from the layer's attributes.

        Raises:
            RetraceError: they are none that a trace has.
        """
        known = {f.name: attributes[f.name] for f in fields(cls) if f.name in attributes}
        source = known.get("source")
        right = (
            all(type(known.get(name)) is int and known[name] >= 1 for name in ("kept", "groups"))
            and is_number(known.get("bytes_per_key"))
            and known["bytes_per_key"] >= 0
            and (source is None or (type(source) is int and source >= 0))
        )
        if not right:
            raise RetraceError(f"The layer's indexer does not fit: {str(attributes)[:80]}.")
        return cls(**known)


@dataclass(frozen=True)
class LayerRules:
    """What turns a layer's queries, keys and values into its attention output.

    The query at position i sees the keys j with `first_visible(i) <= j <= i`; their scores are
    `softcap(scale * q.k)`, and a head's sink adds `exp(sink)` to the denominator of its softmax.
    """

    module: str
    """Path of the attention module inside the model."""
    heads: int
    kv_heads: int
    key_dim: int
    """Channels of a query or key."""
    value_dim: int
    """Channels of a value."""
    scale: float
    window: int | None = None
    """A query sees this many most recent keys, its own included."""
    chunk: int | None = None
    """A query sees the keys of its own chunk of this many positions."""
    softcap: float | None = None
    """Scores are bounded smoothly: softcap * tanh(score / softcap)."""
    sinks: tuple[float, ...] | None = None
    """One learned logit per head that takes attention and has no value."""
    rotation: Rotation | None = None
    """How queries and keys were turned by their position; None where that is not known."""
    kv_source: int | None = None
    """The earlier layer whose very keys this one attends to, where it has none of its own."""
    cached_bytes: int | None = None
    """What one token takes in the model's own cache of the layer, read once for all heads, where
    that is not their keys and values: those of latent attention are made from one vector (and a
    rotated part) that is cached in their place. In the type that caches are served in."""
    indexer: Indexer | None = None
    """How the layer chooses what it attends to, of a natively sparse model; its choices are in the
    array `selected`."""

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.key_dim, self.value_dim) < 1:
            raise RetraceError(f"{self.module}: heads and channels must be at least 1.")
        if self.heads % self.kv_heads:
            raise RetraceError(
                f"{self.module}: {self.heads} heads do not divide into {self.kv_heads} kv heads."
            )
        for name, number in (("scale", self.scale), ("softcap", self.softcap)):
            if number is not None and not SMALLEST <= abs(number) <= LARGEST:
                raise RetraceError(
                    f"{self.module}: {name} must be finite and not 0 in float32, not {number}."
                )
        if self.softcap is not None and self.softcap < 0:
            raise RetraceError(f"{self.module}: softcap must be above 0, not {self.softcap}.")
        for name in ("window", "chunk", "cached_bytes"):
            extent = getattr(self, name)
            if extent is not None and extent < 1:
                raise RetraceError(f"{self.module}: {name} must be at least 1, not {extent}.")
        if self.sinks is not None and len(self.sinks) != self.heads:
            raise RetraceError(
                f"{self.module}: {len(self.sinks)} sinks for {self.heads} heads: one each."
            )
        if self.sinks is not None and not all(map(math.isfinite, self.sinks)):
            raise RetraceError(f"{self.module}: sinks must be finite, not {self.sinks}.")
        if self.indexer is not None and self.indexer.groups not in (1, self.kv_heads):
            raise RetraceError(
                f"{self.module}: {self.indexer.groups} choices of keys for {self.kv_heads} kv "
                "heads."
            )

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.heads // self.kv_heads

    def first_visible(self, position: int) -> int:
        """The first key that the query at `position` sees; the last is its own."""
        first = 0
        if self.window is not None:
            first = max(first, position - self.window + 1)
        if self.chunk is not None:
            first = max(first, position - position % self.chunk)
        return first

    def to_attributes(self) -> dict[str, Any]:
        """As the attributes of the layer's group."""
        attributes = asdict(self)
        if self.sinks is not None:
            attributes["sinks"] = list(self.sinks)
        if self.rotation is not None:
            attributes["rotation"] = self.rotation.to_attributes()
        for name in ("cached_bytes", "indexer"):
            # Said only where it is so: a trace's digest, by which kept results are found, holds.
            if attributes[name] is None:
                del attributes[name]
        return attributes

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> "LayerRules":
        """Read back from the attributes of the layer's group; unknown ones are left alone."""
        known = {f.name: attributes[f.name] for f in fields(cls) if f.name in attributes}
        wrong = [name for name, value in known.items() if not _fits(name, value)]
        if wrong:
            raise RetraceError(
                f"The layer's attributes do not fit: {wrong[0]} is {str(known[wrong[0]])[:80]}."
            )
        if known.get("sinks") is not None:
            known["sinks"] = tuple(known["sinks"])
        if known.get("rotation") is not None:
            known["rotation"] = Rotation.from_attributes(known["rotation"])
        if known.get("indexer") is not None:
            known["indexer"] = Indexer.from_attributes(known["indexer"])
        try:
            rules = cls(**known)
        except TypeError as error:
            raise RetraceError(f"The layer's attributes are incomplete: {error}.") from error
        if rules.rotation is not None and rules.rotation.end > rules.key_dim:
            raise RetraceError("The layer's rotation turns more channels than its keys have.")
        return rules


def _fits(name: str, value: Any) -> bool:
    """Whether what anybody may have written as a layer's attribute is of its type."""
    if name in ("heads", "kv_heads", "key_dim", "value_dim"):
        return type(value) is int
    if name in ("window", "chunk", "kv_source", "cached_bytes"):
        return value is None or type(value) is int
    if name == "scale":
        return is_number(value)
    if name == "softcap":
        return value is None or (is_number(value) and value > 0)
    if name == "sinks":
        return value is None or (isinstance(value, list) and all(map(is_number, value)))
    if name in ("rotation", "indexer"):
        return value is None or isinstance(value, dict)
    return isinstance(value, str)


def prompts(phases: Sequence[npt.NDArray[np.int8]]) -> list[int | None]:
    """How many positions of each sequence are read at once, before any is decoded; None for all
    where nothing is decoded.

    Raises:
        RetraceError: what is generated is followed by more that is read, as in a chat.
    """
    generated = [phase == PHASES["generated"] for phase in phases]
    if not any(bool(one.any()) for one in generated):
        return [None] * len(phases)
    if any(bool((one[:-1] & ~one[1:]).any()) for one in generated):
        raise RetraceError(
            "Its sequences go on after what was generated, as a chat does: they can be analyzed, "
            "and not run again."
        )
    return [int((~one).sum()) for one in generated]


def tensor_shapes(
    rules: LayerRules, positions: int, queries: int
) -> dict[str, tuple[int, int, int]]:
    """The arrays of a layer by name: their extents besides the sequences, for sequences of at most
    so many positions and kept queries."""
    shapes = {
        "query": (rules.heads, queries, rules.key_dim),
        "key": (rules.kv_heads, positions, rules.key_dim),
        "value": (rules.kv_heads, positions, rules.value_dim),
    }
    if rules.indexer is not None:
        shapes["selected"] = (rules.indexer.groups, queries, min(rules.indexer.kept, positions))
    return shapes


def tensor_dtype(name: str, dtype: str) -> np.dtype[Any]:
    """Element type of a layer's array of this name in a trace of this dtype."""
    return np.dtype("int32") if name == "selected" else DTYPES[dtype]


def layer_bytes(rules: LayerRules, positions: int, queries: int, dtype: str) -> int:
    """Bytes of a layer's arrays for one sequence, in a trace of this dtype."""
    return sum(
        math.prod(shape) * tensor_dtype(name, dtype).itemsize
        for name, shape in tensor_shapes(rules, positions, queries).items()
    )
