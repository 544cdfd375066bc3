"""From the characters of a text to the positions of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retrace.traces import RetraceError, joined_spans


@dataclass(frozen=True)
class Encoded:
    """A text as tokens, and the characters that each stands for."""

    tokens: list[int]
    characters: list[tuple[int, int]]
    """Of each token its first character and the one after its last: equal where it stands for none,
    and shared by the tokens of one character."""

    def positions(self, start: int, stop: int) -> tuple[range, ...]:
        """The positions whose tokens hold any of the characters from `start` to before `stop`."""
        held = [
            range(position, position + 1)
            for position, (first, end) in enumerate(self.characters)
            if first < stop and end > start and first < end
        ]
        return joined_spans(held)


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
    return Encoded(
        [*before, *encoding["input_ids"]],
        [*((0, 0) for _ in before), *map(tuple, encoding["offset_mapping"])],
    )
