"""Chats as a model's own template writes them, and where their messages stand in that."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrace.traces import RetraceError

Message = Mapping[str, str]
"""Of a chat: its `role` (system, user, assistant, ...) and its `content`."""
PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
"""What stands for a message's content where its place is looked for: private characters, which no
text has and no template trims."""


@dataclass(frozen=True)
class Piece:
    """A content, and where it stands in the text that the model reads."""

    content: str
    begin: int
    """Where the first of its characters that are kept stands."""
    kept: range
    """Its characters that stand there: a template may strip white space at both ends."""

    def place(self, start: int, stop: int) -> range:
        """Where those of its characters stand that are kept, from `start` to before `stop`."""
        first, end = max(start, self.kept.start), min(stop, self.kept.stop)
        shift = self.begin - self.kept.start
        return range(first + shift, max(first, end) + shift)


def with_system(messages: Sequence[Message], instruction: str | None) -> list[Message]:
    """Messages that begin with the system's instruction, where there is one.

    Raises:
        RetraceError: they begin with another one.
    """
    if instruction is None:
        return [*messages]
    if messages[0]["role"] == "system":
        raise RetraceError(
            "The messages begin with the system's own: leave out --system-instruction."
        )
    return [{"role": "system", "content": instruction}, *messages]


def render_chat(tokenizer: Any, messages: Sequence[Message], goes_on: bool | None = None) -> str:
    """A chat as text: what the assistant begins to answer or, where that `goes_on`, what the last
    message ends with; by default it goes on where that is its own.

    Raises:
        RetraceError: the tokenizer has no chat template, or its template refuses these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RetraceError(
            "The model's tokenizer has no chat template: give plain prompts, without "
            "--apply-chat-template, or a model that was trained to chat."
        )
    goes_on = messages[-1]["role"] == "assistant" if goes_on is None else goes_on
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
        )
    # A template is a program of the model's, which raises what it likes.
    except Exception as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise RetraceError(f"The model's chat template refuses the messages: {cause}.") from error
    return text


def find_contents(tokenizer: Any, messages: Sequence[Message], text: str) -> list[Piece]:
    """Where the content of each message stands in the `text` of a chat.

    Raises:
        RetraceError: the template writes one otherwise than once and as it is, but for white space
            at its ends.
    """
    marked = [
        {**message, "content": f"\ue000{number}\ue001"} for number, message in enumerate(messages)
    ]
    literals = PLACEHOLDER.split(render_chat(tokenizer, marked))
    order = [int(number) for number in literals[1::2]]
    pieces: dict[int, Piece] = {}
    if sorted(order) == list(range(len(messages))) and text.startswith(literals[0]):
        place = len(literals[0])
        for number, literal in zip(order, literals[2::2], strict=True):
            content = messages[number]["content"]
            kept = _kept(content, text, place, literal)
            if kept is None:
                break
            pieces[number] = Piece(content, place, kept)
            place += len(kept) + len(literal)
        if len(pieces) == len(messages) and place == len(text):
            return [pieces[number] for number in range(len(messages))]
    raise RetraceError(
        "The model's chat template does not write every message as it is, so that spans and scored "
        "answers have no place that is known: leave them out, or write the chat as a text."
    )


def _kept(content: str, text: str, place: int, literal: str) -> range | None:
    """The characters of a content that stand at a place of a text, before a `literal`."""
    left = len(content) - len(content.lstrip())
    right = len(content.rstrip())
    for kept in (
        range(len(content)),
        range(left, max(left, right)),
        range(left, len(content)),
        range(right),
    ):
        written = content[kept.start : kept.stop] + literal
        if text.startswith(written, place):
            return kept
    return None


def around_user(tokenizer: Any, instruction: str | None) -> tuple[str, str]:
    """What a chat's template writes before and after what a user says first.

    Raises:
        RetraceError: there is no template, or it does not write what the user says once.
    """
    messages = with_system([{"role": "user", "content": "\ue0000\ue001"}], instruction)
    literals = PLACEHOLDER.split(render_chat(tokenizer, messages))
    if len(literals) != 3:
        raise RetraceError("The model's chat template does not write what the user says once.")
    return literals[0], literals[2]
