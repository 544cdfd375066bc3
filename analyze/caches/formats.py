"""What a format of cached vectors is: how it rounds them, when, and what it takes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retrace.traces import RetraceError

HALF_BYTES = 2
"""Of a scale, offset or norm that is held in float16."""


@dataclass(frozen=True)
class Format:
    """A way to hold the keys or the values of one kv head in few bits.

    A token is rounded once, and stays so: by itself as it comes, or together with the others of its
    group as soon as these have all come. Until then, and where the format says so for longer, it is
    held in full, as the newest tokens are.
    """

    step: ClassVar[int | None] = None
    """Queries at positions m * step to (m + 1) * step - 1 find the same tokens rounded; None where
    no token is ever held in full."""
    slides: ClassVar[bool] = False
    """Whether, for all that, single tokens are rounded in between: every query finds one more."""

    def rounded(self, vectors: Tensor) -> Tensor:
        """What the bits give back of vectors (tokens, channels) float32, as far as these fill whole
        groups of tokens: (whole, channels) float32."""
        raise NotImplementedError

    def bytes(self, channels: int) -> float:
        """Of one rounded token of so many channels, with its share of scales."""
        raise NotImplementedError

    def first_full(self, position: Tensor) -> Tensor:
        """The first token that is held in full when the query at each position (any,) reads them
        all; one past the query's own where none is."""
        return position + 1

    def check(self, channels: int) -> None:
        """Refuse vectors of a size that the format cannot hold.

        Raises:
            RetraceError: it cannot.
        """

    def _check_multiple(self, channels: int, size: int) -> None:
        if channels % size:
            raise RetraceError(
                f"{self} holds channels by {size}, and there are {channels} of them."
            )


def half(numbers: Tensor) -> Tensor:
    """Numbers as float16 gives them back, the largest finite one for larger ones."""
    most = torch.finfo(torch.float16).max
    return numbers.clamp(-most, most).to(torch.float16).to(numbers.dtype)
