"""Rotary position encoding as a layer applied it, and how to undo it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrace.traces.errors import RetraceError

PAIRINGS = ("half", "interleaved")


@dataclass(frozen=True)
class Rotation:
    """How a layer turned its queries and keys by their position (Su et al., arXiv 2104.09864).

    Pair p of the rotated channels turns by `position * frequencies[p]` and is multiplied by
    `scaling`. Without frequencies nothing turns: the layer has no position encoding of its own.

    >>> Rotation((1.0, 0.01)).pairs().tolist()
    [[0, 2], [1, 3]]
    """

    frequencies: tuple[float, ...] = ()
    """Radians per position of each pair of channels, as the model scaled them."""
    first: int = 0
    """The first rotated channel; those that are not rotated stand before or after."""
    pairing: str = "half"
    """Channels of a pair: half (i and i + pairs) or interleaved (2i and 2i + 1)."""
    scaling: float = 1.0
    """Factor of the rotated channels (YaRN, arXiv 2309.00071, section 3.4)."""

    def __post_init__(self) -> None:
        if self.pairing not in PAIRINGS:
            raise RetraceError(
                f"pairing must be one of {', '.join(PAIRINGS)}, not {self.pairing!r}."
            )

    def pairs(self) -> npt.NDArray[np.intp]:
        """The channels of each pair (pairs, 2)."""
        count = len(self.frequencies)
        channels = np.arange(self.first, self.first + 2 * count)
        if self.pairing == "half":
            return channels.reshape(2, count).T
        return channels.reshape(count, 2)

    def apply(self, vectors: npt.NDArray[Any], positions: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Vectors (heads, positions, channels) turned by their positions (positions,), in float32,
        or in float64 if that is what they are."""
        return self._turn(vectors, positions, 1.0, self.scaling)

    def undo(self, vectors: npt.NDArray[Any], positions: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What `apply` makes `vectors` (heads, positions, channels) from, in the same types."""
        return self._turn(vectors, positions, -1.0, 1 / self.scaling)

    def _turn(
        self,
        vectors: npt.NDArray[Any],
        positions: npt.NDArray[Any],
        direction: float,
        factor: float,
    ) -> npt.NDArray[Any]:
        dtype: npt.DTypeLike = np.float64 if vectors.dtype == np.float64 else np.float32
        turned: npt.NDArray[Any] = np.array(vectors, dtype=dtype)
        # Angles in float64: in float32 they are off by thousandths after some ten thousand turns.
        frequencies = direction * np.asarray(self.frequencies, np.float64)
        angles: npt.NDArray[np.float64] = np.multiply.outer(positions, frequencies)
        cos: npt.NDArray[Any] = (factor * np.cos(angles)).astype(dtype)
        sin: npt.NDArray[Any] = (factor * np.sin(angles)).astype(dtype)
        one, other = self.pairs().T
        a, b = turned[..., one], turned[..., other]
        turned[..., one] = a * cos - b * sin
        turned[..., other] = b * cos + a * sin
        return turned

    def to_attributes(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return {**asdict(self), "frequencies": list(self.frequencies)}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> "Rotation":
        """Read back from what `to_attributes` gave."""
        frequencies = attributes.get("frequencies")
        if not isinstance(frequencies, list | tuple) or not all(map(is_number, frequencies)):
            raise RetraceError("The layer's rotation has no list of frequencies.")
        try:
            rotation = cls(**{**attributes, "frequencies": tuple(frequencies)})
        except TypeError as error:
            raise RetraceError(f"The layer's rotation is incomplete: {error}.") from error
        scaled = is_number(rotation.scaling) and rotation.scaling != 0
        if not scaled or type(rotation.first) is not int or rotation.first < 0:
            raise RetraceError("The layer's rotation does not fit: see its first and scaling.")
        return rotation

    @property
    def end(self) -> int:
        """The channel after the last rotated one."""
        return self.first + 2 * len(self.frequencies)


def is_number(value: object) -> bool:
    """Whether JSON gave a finite number."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
