"""Needles in haystacks: prompts of an exact length that hide a sentence and then ask for it.

The sentence stands at any depth of any text, and where it, the question and the answer stand is
known, so that a trace of these prompts tells whether a method finds what it should. The form is
that of Kamradt's test (https://github.com/gkamradt/LLMTest_NeedleInAHaystack) and of RULER's
single needle (arXiv:2404.06654).
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrace.traces import Marks, RetraceError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
"""What a haystack is made of where there is no text: RULER's."""
INTRODUCTION = "A code is hidden in the following text. It will be asked for afterwards.\n\n"
NEEDLE = " The code of the {key} is {value}."
QUESTION = "\n\nWhat is the code of the {key}?"
BEGUN = "\nThe code of the {key} is"
"""What the answer begins with, as in RULER, so that the model has only to copy."""
ANSWER = " {value}"
QUALITIES = "amber blue calm dark early faint grey high idle jolly keen late mild north".split()
THINGS = "anchor bridge castle door engine falcon garden harbour island jacket kettle lamp".split()
NEAR = 20
"""A needle stands between two sentences where some end within a 20th of the haystack from its
depth; in a text without sentences, at its depth."""
CHARACTERS_PER_TOKEN = 64
"""No more of a text is tokenised than this, times the tokens of the longest prompt."""


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt, and where what matters in it stands."""

    tokens: npt.NDArray[np.int32]
    """Token ids (positions,)."""
    marks: Marks
    """Positions of the `evidence`, which is the needle, of the `question`, what begins the answer
    included, and of the `answer`, where it is there."""
    answer: str
    """What the model should write."""
    depth: int
    """Where the needle was to be, in per cent of the haystack."""


def needle_prompts(
    tokenizer: Any,
    haystack: str = "",
    *,
    lengths: Sequence[int],
    depths: Sequence[int] = (0, 25, 50, 75, 100),
    seed: int = 0,
    answered: bool = True,
    prefix: Sequence[int] = (),
    before: str = "",
    after: str = "",
) -> Iterator[NeedlePrompt]:
    """A prompt for each length and depth, in this order, that hides a needle of its own.

    Args:
        tokenizer: of transformers.
        haystack: a text to hide needles in, read again from its beginning where it is too short;
            `NOISE` by default. Each prompt begins it at another sentence.
        lengths: tokens of the prompts, all included.
        depths: where the needle is, in per cent of the haystack.
        seed: of needles, and of where the haystack begins.
        answered: whether the answer is there, or is to be generated.
        prefix: token ids that each prompt begins with.
        before: text before the prompt, such as a chat template's.
        after: text between the question and what the answer begins with.

    Raises:
        RetraceError: the haystack has no tokens, or a length no room for a needle and its question.
    """

    def encode(text: str) -> list[int]:
        tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    most = CHARACTERS_PER_TOKEN * max(lengths)
    straw = np.array(encode(haystack[:most] or NOISE * (max(lengths) // 8 + 1)), np.int32)
    if not len(straw):
        raise RetraceError("The haystack has no text.")
    ends = _sentence_ends(tokenizer, straw)
    head = [*prefix, *encode(before + INTRODUCTION)]
    for length in lengths:
        for depth in depths:
            draw = random.Random(f"{seed} {length} {depth}")
            names = {
                "key": f"{draw.choice(QUALITIES)} {draw.choice(THINGS)}",
                "value": draw.randrange(10**6, 10**7),
            }
            needle, question, begun = (
                encode(text.format(**names)) for text in (NEEDLE, QUESTION, BEGUN)
            )
            between = encode(after) if after else []
            answer = encode(ANSWER.format(**names)) if answered else []
            rest = (*question, *between, *begun, *answer)
            room = length - len(head) - len(needle) - len(rest)
            if room < 0:
                raise RetraceError(
                    f"A needle, its question and what is around them take {length - room} tokens: "
                    f"a prompt of {length} has no room for them (--lengths)."
                )
            start = _beginning(draw, ends, room)
            places = (start + np.arange(room)) % len(straw)
            place = _nearest(ends[places], round(room * depth / 100))
            tokens = [*head, *straw[places[:place]], *needle, *straw[places[place:]], *rest]
            asked = len(head) + room + len(needle)
            told = asked + len(question) + len(between)
            marks = {
                "evidence": [range(len(head) + place, len(head) + place + len(needle))],
                "question": [
                    range(asked, asked + len(question)),
                    range(told, told + len(begun)),
                ],
            }
            if not between:
                marks["question"] = [range(asked, told + len(begun))]
            if answered:
                marks["answer"] = [range(length - len(answer), length)]
            yield NeedlePrompt(np.array(tokens, np.int32), marks, str(names["value"]), depth)


def _sentence_ends(tokenizer: Any, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Whether a sentence or paragraph ends with each of the tokens (positions,)."""
    known = np.unique(tokens)
    texts = [tokenizer.decode([int(token)]) for token in known]
    ending = [text.rstrip().endswith((".", "!", "?")) or "\n" in text for text in texts]
    return np.isin(tokens, known[ending])


def _beginning(draw: random.Random, ends: npt.NDArray[np.bool_], room: int) -> int:
    """A token that a sentence of the text begins with, from where there is text enough if there is
    such a place."""
    starts = np.concatenate([[0], np.flatnonzero(ends[:-1]) + 1])
    enough = starts[starts <= len(ends) - room]
    return int(draw.choice(enough if len(enough) else starts))


def _nearest(ends: npt.NDArray[np.bool_], place: int) -> int:
    """Where something is put in between of a haystack (positions,) in which sentences end."""
    after = np.concatenate([[0], np.flatnonzero(ends) + 1, [len(ends)]])
    nearest = int(after[np.abs(after - place).argmin()])
    return nearest if abs(nearest - place) * NEAR <= len(ends) else place
