"""Documents cut to windows of tokens, and the sets that these make."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from retrace.traces import PHASES, Marks, RetraceError

Tokens = npt.NDArray[np.int32]
MARGIN_TOKENS = 64
"""How far the end of a text that is cut short may change the tokens before it, amply."""


@dataclass(frozen=True)
class SequenceSet:
    """The sequences of one task or text file."""

    task: str
    """Name of the task; `text` for a text file."""
    source: str
    """Data set or file that they were read from."""
    sequences: list[Tokens]
    """Token ids (positions,) of each sequence."""
    scored: list[int] | None = None
    """How many positions at the end of each sequence are scored text; none by default."""
    num_fewshot: int | None = None
    """Examples before each document, where it is a task of lm-eval-harness."""

    marks: list[Marks] | None = None
    """Named spans of positions of each sequence; none by default."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the trace's attributes tell of the task."""

    def phases(self) -> list[npt.NDArray[np.int8]]:
        """What each position (positions,) of each sequence is, a code in `PHASES`."""
        phases = []
        for number, tokens in enumerate(self.sequences):
            phase = np.full(len(tokens), PHASES["context"], np.int8)
            if self.scored is not None:
                phase[len(tokens) - self.scored[number] :] = PHASES["continuation"]
            phases.append(phase)
        return phases


class WindowCutter:
    """Turns documents into consecutive windows of 2 to `max_length` tokens.

    Each begins with what the tokenizer puts before a text by itself, such as a BOS token. What it
    puts after one, where it does, is left out: a window may end in the middle of a text. No more of
    a document is tokenised than is needed for `limit` windows.
    """

    def __init__(self, tokenizer: Any, max_length: int, limit: int | None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._limit = limit
        self.prefix = tokens_before_text(tokenizer)
        """Token ids that each window begins with."""
        self._content = max_length - len(self.prefix)
        if self._content < 1:
            raise RetraceError(
                f"The tokenizer puts {len(self.prefix)} tokens before a text: sequences of "
                f"{max_length} have no room for any of it. Raise --max-length."
            )

    def windows(self, documents: Iterable[TextIO]) -> list[Tokens]:
        """Windows (positions,) of the documents, in their order, `limit` at most."""
        windows: list[Tokens] = []
        for document in documents:
            left = None if self._limit is None else self._limit - len(windows)
            tokens = self._first_tokens(document, None if left is None else left * self._content)
            for start in range(0, len(tokens), self._content):
                window = self.prefix + tokens[start : start + self._content]
                if len(window) >= 2:  # one token alone predicts nothing
                    windows.append(np.array(window, np.int32))
            if self._limit is not None and len(windows) >= self._limit:
                return windows[: self._limit]
        return windows

    def _first_tokens(self, document: TextIO, count: int | None) -> list[int]:
        """The document's first `count` tokens, as tokenising all of it would give them."""
        if count is None:
            return self._tokenize(document.read())
        text = document.read(6 * (count + MARGIN_TOKENS))
        while True:
            tokens = self._tokenize(text)
            if len(tokens) >= count + MARGIN_TOKENS:
                return tokens[:count]
            more = document.read(max(len(text), 4096))
            if not more:
                return tokens[:count]
            text += more

    def _tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens


def tokens_before_text(tokenizer: Any) -> list[int]:
    """Ids of the special tokens that a tokenizer puts before every text by itself.

    They precede, in what it gives for "a", what it gives for "a" without special tokens.
    """
    whole: list[int] = tokenizer("a")["input_ids"]
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(plain) + 1) if plain else ()
    for start in starts:
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    # It writes a text otherwise after special tokens.
    return list(itertools.takewhile(set(tokenizer.all_special_ids).__contains__, whole))
