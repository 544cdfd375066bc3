"""Tensors of sequences that still grow: in memory, and beyond that in files of their own."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from retrace.traces import to_numpy

MEMORY_BYTES = 1 << 30
"""Host memory that a spool takes before it goes to files."""

Place = tuple[int, int, str]
"""Sequence, layer, and which tensor."""


@dataclass
class _Grown:
    """One tensor as far as it has come, position after position."""

    shape: tuple[int, int]
    """Heads and channels."""
    dtype: np.dtype[Any]
    parts: list[npt.NDArray[Any]] = field(default_factory=list)
    """In memory, each (positions, heads, channels)."""
    filed: int = 0
    """Positions before those, which are in the file."""

    @property
    def length(self) -> int:
        """Positions."""
        return self.filed + sum(map(len, self.parts))

    @property
    def row_bytes(self) -> int:
        """Bytes of one position."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


class Spool:
    """Holds what is appended to each sequence's tensors until it is known how long they are.

    Zarr arrays have their sizes from the start, and shards are written whole: neither is known
    while a model still goes on with a sequence.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is for the files."""
        self._folder = folder
        self._held = 0
        self._grown: dict[Place, _Grown] = {}

    def append(self, sequence: int, layer: int, name: str, tensor: Tensor) -> None:
        """Take what a sequence gains: tensor (heads, positions, channels), on any device."""
        # A copy, since the model may write into its own, and by position, as files grow.
        part = to_numpy(tensor.detach().transpose(0, 1).to("cpu", copy=True))
        place = (sequence, layer, name)
        if place not in self._grown:
            self._grown[place] = _Grown(part.shape[1:], part.dtype)
        self._grown[place].parts.append(part)
        self._held += part.nbytes
        if self._held > MEMORY_BYTES:
            self._to_files()

    def length(self, sequence: int, layer: int, name: str) -> int:
        """Positions that a tensor has."""
        grown = self._grown.get((sequence, layer, name))
        return 0 if grown is None else grown.length

    def cut(self, sequence: int, layer: int, name: str, length: int) -> None:
        """Forget what a tensor has beyond `length` positions."""
        place = (sequence, layer, name)
        grown = self._grown.get(place)
        if grown is None or grown.length <= length:
            return
        whole = np.concatenate(grown.parts) if grown.parts else None
        if whole is not None:
            self._held -= whole.nbytes
            kept = whole[: max(0, length - grown.filed)].copy()
            self._held += kept.nbytes
            grown.parts = [kept]
        if grown.filed > length:
            grown.filed = length
            with self._file(place).open("r+b") as opened:
                opened.truncate(length * grown.row_bytes)

    def read(self, sequence: int, layer: int, name: str) -> npt.NDArray[Any]:
        """A tensor (heads, positions, channels) as it is now."""
        place = (sequence, layer, name)
        grown = self._grown[place]
        parts = list(grown.parts)
        if grown.filed:
            raw = np.fromfile(self._file(place), np.uint8).view(grown.dtype)
            parts.insert(0, raw.reshape(grown.filed, *grown.shape))
        return np.ascontiguousarray(np.concatenate(parts).swapaxes(0, 1))

    def forget(self, sequence: int) -> None:
        """Drop all of a sequence."""
        for place in [place for place in self._grown if place[0] == sequence]:
            self.cut(*place, 0)
            del self._grown[place]
            self._file(place).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _to_files(self) -> None:
        for place, grown in self._in_memory():
            with self._file(place).open("ab") as opened:
                for part in grown.parts:
                    opened.write(part.tobytes())
            grown.filed, grown.parts = grown.length, []
        self._held = 0

    def _in_memory(self) -> Iterator[tuple[Place, _Grown]]:
        return ((place, grown) for place, grown in self._grown.items() if grown.parts)

    def _file(self, place: Place) -> Path:
        return self._folder / "-".join(map(str, place))
