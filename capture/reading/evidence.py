"""Where a document of a long-context task stands in its prompt, and what answers its question."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

FIELDS = (("input", "outputs"), ("context", "answers"), ("input", "target"))
"""Haystack and answers of a document, as RULER, LongBench and BABILong name them."""
NEEDLE = re.compile(r"One of the special magic \w+ for \S+ is: (\S+)\.")
"""How RULER writes a needle (lm_eval/tasks/ruler/prepare_niah.py), and its value in it."""
QUESTION = re.compile(
    r"What (?:is|are all) the special magic .{1,400}? mentioned in the provided text\?"
)
"""How RULER asks for one."""
LEAST_ANSWER = 3
"""Characters of an answer that is looked for: a shorter one stands in many places by chance."""


def parts_of_document(document: Any, text: str) -> dict[str, list[range]]:
    """Characters of the `evidence` and the `question` in a prompt, as far as the document tells.

    Evidence are RULER's needles with an answer in it, or else the places where an answer stands as
    a word of its own; nothing is where the prompt does not hold the document as it is.

    >>> parts_of_document(
    ...     {"context": "Ann is in Rome.", "answers": ["Rome"], "question": "Where is Ann?"},
    ...     "Read: Ann is in Rome. Where is Ann?",
    ... )
    {'evidence': [range(16, 20)], 'question': [range(22, 35)]}
    """
    if not isinstance(document, Mapping):
        return {}
    for haystack, answers in FIELDS:
        held, given = document.get(haystack), document.get(answers)
        listed = given if isinstance(given, list) else [given]
        wanted = [a for a in listed if isinstance(a, str) and len(a) >= LEAST_ANSWER]
        if not isinstance(held, str) or not held.strip() or not wanted:
            continue
        # Solved examples stand before the document itself.
        start = text.rfind(held.strip())
        if start < 0:
            continue
        stop = start + len(held.strip())
        evidence = [*_needles(text, start, stop, wanted)] or [
            *_occurrences(text, start, stop, wanted)
        ]
        parts = {"evidence": evidence} if evidence else {}
        if question := _question(document, text, start, stop):
            parts["question"] = [question]
        return parts
    return {}


def _question(document: Mapping[str, Any], text: str, start: int, stop: int) -> range | None:
    asked = document.get("question")
    if isinstance(asked, str) and asked.strip():
        place = text.find(asked.strip(), stop)
        return range(place, place + len(asked.strip())) if place >= 0 else None
    found = [*QUESTION.finditer(text, start, stop)]
    return range(*found[-1].span()) if found else None


def _needles(text: str, start: int, stop: int, answers: list[str]) -> Iterator[range]:
    for found in NEEDLE.finditer(text, start, stop):
        if found[1] in answers:
            yield range(*found.span())


def _occurrences(text: str, start: int, stop: int, answers: list[str]) -> Iterator[range]:
    for answer in answers:
        whole = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)")
        yield from (range(*found.span()) for found in whole.finditer(text, start, stop))
