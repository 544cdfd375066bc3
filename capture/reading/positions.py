"""From the characters of a text to the positions of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrace.traces import RetraceError, joined_spans


@dataclass(frozen=True)
class Encoded:
    """A text as tokens, and the characters that each stands for."""

    tokens: list[int]
    characters: npt.NDArray[np.int64]
    """Of each token (tokens, 2) its first character and the one after its last: equal where it
    stands for none, and shared by the tokens of one character."""

    def positions(self, start: int, stop: int) -> tuple[range, ...]:
        """The positions whose tokens hold any of the characters from `start` to before `stop`."""
        first, end = self.characters.T
        held = np.flatnonzero((first < stop) & (end > start) & (first < end)).tolist()
        return joined_spans([range(position, position + 1) for position in held])


def encode_with_places(tokenizer: Any, text: str, before: Sequence[int] = ()) -> Encoded:
    """A text as tokens, after those that stand `before` it and for none of its characters.

    Raises:
        RetraceError: the tokenizer cannot tell what its tokens stand for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise RetraceError(
            f"{type(tokenizer).__name__} does not tell which characters its tokens stand for, as a "
            "fast tokenizer does: read these texts without spans and completions."
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = [*((0, 0) for _ in before), *encoding["offset_mapping"]]
    tokens = [*before, *encoding["input_ids"]]
    return Encoded(tokens, np.array(places, np.int64).reshape(-1, 2))
