"""Whether what methods are handed is still as it was: what one writes, all others would read."""

from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor

from retrace.traces import RetraceError

ROWS = 1 << 14
"""Rows that are summed at once: what a sum reads twice stays in a cache."""


class Seal:
    """Sums of some tensors' bits, which change with whatever is written into them: through
    PyTorch, through a NumPy view or through another library."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """The tensors by the names that a user knows them by."""
        self._tensors = dict(tensors)
        self._sums = {name: checksum(tensor) for name, tensor in self._tensors.items()}

    def broken(self) -> Iterator[str]:
        """The names of those that were written into."""
        for name, tensor in self._tensors.items():
            if not torch.equal(checksum(tensor), self._sums[name]):
                yield name


class WrittenInto(RetraceError):
    """A method wrote into what it was handed."""

    @classmethod
    def tensor(cls, name: str) -> Self:
        """The error, naming what it wrote into."""
        return cls(
            f"wrote into {name}, which is handed to others too: work on a copy (`keys.clone()`)."
        )


def checksum(tensor: Tensor) -> Tensor:
    """Two sums of a tensor's bits, in which every row and every column has a weight of its own:
    numbers that change places change them too. Integers, so that no bit is rounded away."""
    flat = tensor.detach()
    flat = flat.flatten(0, -2) if flat.dim() > 1 else flat.reshape(1, -1)
    sums = torch.zeros(2, dtype=torch.int64, device=flat.device)
    if not flat.numel():
        return sums
    columns = None
    for start in range(0, len(flat), ROWS):
        bits = _bits(flat[start : start + ROWS])
        sums[0] += (bits.sum(dim=1) * _weights(start, len(bits), bits.device)).sum()
        below = bits.sum(dim=0)
        columns = below if columns is None else columns + below
    assert columns is not None
    sums[1] = (columns * _weights(0, len(columns), columns.device)).sum()
    return sums


def _bits(rows: Tensor) -> Tensor:
    """The bits of contiguous or strided rows as integers, as long ones as they make."""
    if rows.is_complex():
        rows = torch.view_as_real(rows).flatten(1)
    if rows.dtype == torch.bool:
        return rows.to(torch.int64)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if rows.itemsize == 4 and rows.shape[-1] % 2 == 0 and rows.is_contiguous():
        if rows.storage_offset() % 2 == 0:
            return rows.view(torch.int64)
    return rows.view(kinds[rows.itemsize])


def _weights(start: int, count: int, device: torch.device) -> Tensor:
    """Odd numbers that are far from a pattern, one for each place from `start` on."""
    places = torch.arange(start, start + count, device=device)
    mixed = places * -7046029254386353131
    mixed = (mixed ^ (mixed >> 31)) * -4658895280553007687
    return mixed | 1
