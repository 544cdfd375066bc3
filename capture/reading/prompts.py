"""Prompts in files of rows: texts, prompts with a completion, and chats, and spans in them.

Each row is one sequence, read whole. It is one of

    {"text": "..."}
    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "user", "content": "..."}, ...]}

The completion is scored, and so is the last message where it is the assistant's. `spans` names what
is marked: `{"evidence": "a part of the text"}`, or `[start, stop]` in characters (of the prompt and
its completion together; of messages `[number, start, stop]`), or a list of several.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retrace.capture.reading.chat import (
    Message,
    Piece,
    find_contents,
    render_chat,
    with_system,
)
from retrace.capture.reading.documents import read_rows
from retrace.capture.reading.positions import Encoded, encode_with_places
from retrace.capture.reading.windows import SequenceSet, Tokens, WindowCutter
from retrace.capture.settings import CaptureSettings
from retrace.traces import Marks, RetraceError, joined_spans
from retrace.traces.marks import check_names

KINDS = ("text", "prompt", "messages")
"""What a row is, by the column that it has."""


@dataclass(frozen=True)
class _Prompt:
    """A row as the model reads it."""

    text: str
    scored_from: int | None
    """The character that scored text begins with; None where there is none."""
    parts: list[list[Piece]]
    """What spans are told in: the text, the prompt and its completion, or each message."""
    begins: bool
    """Whether the text holds itself the special tokens that it begins with."""
    numbered: bool = False
    """Whether spans say in which of the parts they are, as those of messages do."""


def read_prompts(path: Path, settings: CaptureSettings, cut: WindowCutter) -> SequenceSet:
    """The sequences of a file of prompts.

    Raises:
        RetraceError: a row is no prompt, or cannot be read whole; the line is told.
    """
    sequences: list[Tokens] = []
    scored: list[int] = []
    marks: list[Marks] = []
    for place, row in itertools.islice(read_rows(path), settings.limit):
        try:
            tokens, end, marked = _read_row(row, settings, cut)
        except RetraceError as error:
            raise RetraceError(f"{path}, {place}: {error}") from error
        sequences.append(tokens)
        scored.append(end)
        marks.append(marked)
    if not sequences:
        raise RetraceError(f"{path} holds no prompts.")
    return SequenceSet("prompts", str(path), sequences, scored, marks=marks)


def _read_row(row: Any, settings: CaptureSettings, cut: WindowCutter) -> tuple[Tokens, int, Marks]:
    """(tokens, how many at the end are scored, what is marked) of a row."""
    if not isinstance(row, dict):
        raise RetraceError(f"expected an object with one of {', '.join(KINDS)}.")
    row = {name: value for name, value in row.items() if value is not None}
    kinds = [kind for kind in KINDS if kind in row]
    if len(kinds) != 1:
        found = f"it has {' and '.join(kinds)}" if kinds else f"its columns: {', '.join(row)}"
        raise RetraceError(f"expected one of {', '.join(KINDS)}; {found}.")
    spans = row.get("spans", {})
    chat = "messages" in row or settings.apply_chat_template
    placed = bool(spans) or "completion" in row
    prompt = (_chat if chat else _plain)(row, settings, cut.tokenizer, placed)
    try:
        prompt.text.encode()
    except UnicodeEncodeError as error:
        raise RetraceError(
            "its text holds half a character (a surrogate alone): write it whole."
        ) from error
    begin = cut.tokenizer.bos_token
    begins = prompt.begins or bool(begin and prompt.text.startswith(begin))
    before = [] if begins else cut.prefix
    if spans or prompt.scored_from is not None:
        encoded = encode_with_places(cut.tokenizer, prompt.text, before)
    else:
        tokens = cut.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        encoded = Encoded([*before, *tokens], np.empty((0, 2), np.int64))
    count, most = len(encoded.tokens), cut.max_length
    if prompt.scored_from is not None:
        most += settings.generate  # which nothing of is written after it
    if not 2 <= count <= most:
        raise RetraceError(
            "fewer than two tokens predict nothing."
            if count < 2
            else f"{count:,} tokens, and a sequence has {most:,} besides what is generated: "
            f"--max-length {count + settings.generate} has room for all of it."
        )
    scored: tuple[range, ...] = ()
    if prompt.scored_from is not None:
        scored = encoded.positions(prompt.scored_from, len(prompt.text))
    end = count - scored[0].start if scored else 0
    return np.array(encoded.tokens, np.int32), end, _marks(spans, prompt, encoded)


def _plain(row: Mapping[str, Any], settings: CaptureSettings, *_: Any) -> _Prompt:
    """A text, or a prompt with its completion, as it is."""
    context, completion = _texts(row)
    if settings.system_instruction is not None:
        before = f"{settings.system_instruction}\n\n"
    else:
        before = ""
    pieces = [Piece(context, len(before), range(len(context)))]
    return _with_completion(before + context, pieces, completion, begins=False)


def _with_completion(
    text: str, pieces: list[Piece], completion: str | None, *, begins: bool
) -> _Prompt:
    if completion is None:
        return _Prompt(text, None, [pieces], begins)
    answer = Piece(completion, len(text), range(len(completion)))
    return _Prompt(text + completion, len(text), [[*pieces, answer]], begins)


def _chat(
    row: Mapping[str, Any], settings: CaptureSettings, tokenizer: Any, placed: bool
) -> _Prompt:
    """Messages, or what a user says, as the model's chat template writes them; where contents
    stand is found if they are to be `placed`."""
    completion = None
    if "messages" in row:
        messages = _messages(row["messages"])
    else:
        context, completion = _texts(row)
        messages = [{"role": "user", "content": context}]
    whole = with_system(messages, settings.system_instruction)
    text = render_chat(tokenizer, whole)
    answered = messages[-1]["role"] == "assistant"
    pieces: list[Piece] = []
    if placed or answered:
        pieces = find_contents(tokenizer, whole, text)[len(whole) - len(messages) :]
    if completion is not None or "messages" not in row:
        return _with_completion(text, pieces, completion, begins=True)
    scored_from = pieces[-1].begin if answered else None
    parts = [[piece] for piece in pieces]
    return _Prompt(text, scored_from, parts, begins=True, numbered=True)


def _texts(row: Mapping[str, Any]) -> tuple[str, str | None]:
    """The text or prompt of a row, and the completion if there is one."""
    name = "text" if "text" in row else "prompt"
    if name == "text" and "completion" in row:
        raise RetraceError("a text has no completion: name what comes before it prompt.")
    texts = [row[one] for one in (name, "completion") if one in row]
    for one, text in zip((name, "completion"), texts, strict=False):
        if not isinstance(text, str) or not text:
            raise RetraceError(f"what is in {one!r} is no text.")
    return texts[0], texts[1] if len(texts) > 1 else None


def _messages(given: Any) -> list[Message]:
    if not isinstance(given, list) or not given:
        raise RetraceError("messages must be a list of at least one message.")
    for message in given:
        right = isinstance(message, dict) and all(
            isinstance(message.get(name), str) for name in ("role", "content")
        )
        if not right:
            raise RetraceError("each message has a text in 'role' and one in 'content'.")
    if not given[-1]["content"]:
        raise RetraceError("the last message is empty.")
    return given


def _marks(spans: Any, prompt: _Prompt, encoded: Encoded) -> Marks:
    """The positions of what a row's `spans` name."""
    if not isinstance(spans, dict):
        raise RetraceError("spans must be an object: a name, and what it marks.")
    check_names(tuple(spans))
    marks: dict[str, Sequence[range]] = {}
    for name, given in spans.items():
        if given is None:  # as in the rows of a table
            continue
        several = isinstance(given, list) and not all(type(n) is int for n in given)
        held: list[range] = []
        for one in given if several else [given]:
            places = _places(name, one, prompt)
            found = [p for place in places for p in encoded.positions(place.start, place.stop)]
            if not found:
                raise RetraceError(f"span {name}: {_short(one)} has no token of its own.")
            held += found
        marks[name] = joined_spans(held)
    return marks


def _places(name: str, span: Any, prompt: _Prompt) -> list[range]:
    """Where the characters of a span stand in the text that the model reads."""
    parts = prompt.parts
    texts = ["".join(piece.content for piece in pieces) for pieces in parts]
    if isinstance(span, str) and span:
        found = [(n, at) for n, text in enumerate(texts) for at in _occurrences(span, text)]
        if len(found) != 1:
            times = f"stands there {len(found)} times" if found else "is not there"
            raise RetraceError(
                f"span {name}: {_short(span)} {times}; a text that is marked stands there once, "
                "and any other is told by its characters, [start, stop]."
            )
        number, start = found[0]
        stop = start + len(span)
    elif isinstance(span, list) and all(type(n) is int for n in span):
        form = "[message, start, stop]" if prompt.numbered else "[start, stop]"
        if len(span) != form.count(",") + 1:
            raise RetraceError(f"span {name}: {_short(span)} is not {form}.")
        number, start, stop = span if prompt.numbered else [0, *span]
        if not 0 <= number < len(parts) or not 0 <= start < stop <= len(texts[number]):
            raise RetraceError(f"span {name}: {_short(span)} is not inside the text.")
    else:
        raise RetraceError(
            f"span {name}: {_short(span)} is neither a part of the text nor [start, stop]."
        )
    places, before = [], 0
    for piece in parts[number]:
        place = piece.place(max(start - before, 0), min(stop - before, len(piece.content)))
        places += [place] if len(place) else []
        before += len(piece.content)
    return places


def _occurrences(part: str, text: str) -> list[int]:
    found, at = [], text.find(part)
    while at >= 0:
        found.append(at)
        at = text.find(part, at + 1)
    return found


def _short(content: object) -> str:
    text = repr(content)
    return text if len(text) <= 60 else f"{text[:57]}..."
