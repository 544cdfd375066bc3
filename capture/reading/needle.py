"""The task `needle`: sentences hidden in a text, and asked for."""

import itertools
from collections.abc import Iterable

from retrace.capture.needles import CHARACTERS_PER_TOKEN, needle_prompts
from retrace.capture.reading.chat import around_user
from retrace.capture.reading.windows import SequenceSet, WindowCutter
from retrace.capture.settings import CaptureSettings


def read_needles(
    settings: CaptureSettings, cut: WindowCutter, texts: Iterable[str] | None
) -> SequenceSet:
    """The prompts of all lengths and depths, each with its answer unless that is to be generated.

    Args:
        settings: of the capture.
        cut: what the tokenizer puts before texts, and how long a sequence may be.
        texts: the haystack; RULER's sentences by default.
    """
    lengths = settings.lengths or (cut.max_length,)
    before, after, prefix = "", "", cut.prefix
    if settings.apply_chat_template:
        before, after = around_user(cut.tokenizer, settings.system_instruction)
        prefix = []
    elif settings.system_instruction is not None:
        before = f"{settings.system_instruction}\n\n"
    prompts = needle_prompts(
        cut.tokenizer,
        "" if texts is None else _joined(texts, CHARACTERS_PER_TOKEN * max(lengths)),
        lengths=lengths,
        depths=settings.depths,
        seed=settings.seed,
        answered=not settings.generate,
        prefix=prefix,
        before=before,
        after=after,
    )
    made = list(itertools.islice(prompts, settings.limit))
    return SequenceSet(
        "needle",
        "noise" if settings.data is None else str(settings.data),
        [prompt.tokens for prompt in made],
        [sum(map(len, prompt.marks.get("answer", ()))) for prompt in made],
        marks=[prompt.marks for prompt in made],
        facts={
            "lengths": [*lengths],
            "depths": [prompt.depth for prompt in made],
            "seed": settings.seed,
            "answers": [prompt.answer for prompt in made],
        },
    )


def _joined(texts: Iterable[str], characters: int) -> str:
    """Texts with their lines ended, as many as have so many characters."""
    joined: list[str] = []
    count = 0
    for text in texts:
        joined.append(text if text.endswith("\n") else text + "\n")
        count += len(joined[-1])
        if count >= characters:
            break
    return "".join(joined)
