"""Needles in haystacks: of exact length, where they should be, and asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.tiny_models import byte_tokenizer
from retrace.capture import CaptureSettings, capture
from retrace.capture.needles import NeedlePrompt, needle_prompts
from retrace.capture.reading.tasks import read_sequences
from retrace.capture.reading.windows import WindowCutter
from retrace.traces import PHASES, RetraceError

TEXT = "".join(f"Sentence number {i} says little! " for i in range(400))
DEPTHS = (0, 25, 50, 75, 100)


def text_of(prompt: NeedlePrompt, *names: str) -> str:
    """A prompt as text, or what is marked in it."""
    spans = [span for name in names for span in prompt.marks[name]] or [range(len(prompt.tokens))]
    return "".join(byte_tokenizer().decode(prompt.tokens[s.start : s.stop]) for s in spans)


@pytest.mark.parametrize("haystack", ["", TEXT, "short. "], ids=["noise", "text", "repeated"])
@pytest.mark.parametrize("answered", [True, False])
def test_prompts(haystack: str, answered: bool) -> None:
    made = [
        *needle_prompts(
            byte_tokenizer(), haystack, lengths=[300, 1000], answered=answered, prefix=[1]
        )
    ]
    assert [(len(p.tokens), p.depth) for p in made] == [
        (length, depth) for length in (300, 1000) for depth in DEPTHS
    ]
    for prompt in made:
        text, needle = text_of(prompt), text_of(prompt, "evidence")
        key = needle.removeprefix(" The code of the ").removesuffix(f" is {prompt.answer}.")
        assert text.startswith("<s>A code is hidden")
        assert text.count(needle) == 1 and len(prompt.answer) == 7
        assert text_of(prompt, "question") == (
            f"\n\nWhat is the code of the {key}?\nThe code of the {key} is"
        )
        assert ("answer" in prompt.marks) == answered
        asked = prompt.marks["question"][0]
        if answered:
            assert text_of(prompt, "answer") == f" {prompt.answer}"
            assert prompt.marks["answer"][0] == range(asked.stop, len(prompt.tokens))
        else:
            assert asked.stop == len(prompt.tokens)
        # In its place, but for the rest of a sentence.
        (place,) = prompt.marks["evidence"]
        begin = text.index("\n\n") + 2 - len("<s>") + 1
        room = len(prompt.tokens) - begin - len(place) - (len(prompt.tokens) - asked.start)
        assert abs(place.start - begin - room * prompt.depth / 100) <= room / 20 + 1
    assert len({p.answer for p in made}) == len(made)


def test_a_needle_stands_between_sentences() -> None:
    (prompt,) = needle_prompts(byte_tokenizer(), TEXT, lengths=[2000], depths=[50])
    before, after = text_of(prompt).split(text_of(prompt, "evidence"))
    assert before.endswith("!") and after.startswith(" Sentence")


def test_the_same_by_the_same_seed() -> None:
    def made(**options: Any) -> list[list[int]]:
        options = {"lengths": [300], **options}
        return [p.tokens.tolist() for p in needle_prompts(byte_tokenizer(), TEXT, **options)]

    assert made() == made()
    assert made(seed=1) != made()
    assert made(depths=[50]) == made()[2:3]  # whatever else is asked for
    assert made(lengths=[200, 300])[5:] == made()


def test_no_room() -> None:
    with pytest.raises(RetraceError, match=r"a prompt of 100 has no room .*--lengths"):
        [*needle_prompts(byte_tokenizer(), lengths=[100])]


def read(**settings: Any) -> Any:
    """The sequences of the task, by a tokenizer of one token per byte."""
    tokenizer = byte_tokenizer(True)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</>{% endfor %}"
        "<assistant>"
    )
    asked = CaptureSettings(pretrained="x", tasks=["needle"], **settings)
    cut = WindowCutter(tokenizer, 400 - asked.generate, asked.limit)
    (found,) = read_sequences(asked, cut)
    return found


def test_the_task() -> None:
    found = read()
    assert [len(tokens) for tokens in found.sequences] == [400] * 5
    assert found.scored == [8] * 5
    assert found.facts["depths"] == [*DEPTHS] and found.source == "noise"
    found = read(generate=10, depths=[0, 100], lengths=[300, 350], limit=3)
    assert [len(tokens) for tokens in found.sequences] == [300, 300, 350]
    assert found.scored == [0, 0, 0]
    assert len(found.facts["answers"]) == 3


def test_in_a_chat() -> None:
    found = read(apply_chat_template=True, system_instruction="Hm.", depths=[50])
    tokens, marks = found.sequences[0], found.marks[0]
    text = byte_tokenizer().decode(tokens)
    assert len(tokens) == 400
    assert text.startswith("<system>Hm.</><user>A code is hidden")
    question, begun = (byte_tokenizer().decode(tokens[s.start : s.stop]) for s in marks["question"])
    assert question.startswith("\n\nWhat is") and begun.startswith("\nThe code")
    assert f"{question}</><assistant>{begun}" in text
    assert (
        read(system_instruction="Hm.").sequences[0][1:6].tolist()
        == (byte_tokenizer()("Hm.\n\n")["input_ids"])
    )


def test_haystacks_in_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One line. \nAnother line. \n" * 40)
    text = byte_tokenizer().decode(read(data=tmp_path / "a.txt").sequences[2])
    assert "Another line. \nOne line. \n" in text
    (tmp_path / "rows.jsonl").write_text('{"text": "First row."}\n{"text": "Second row."}\n')
    text = byte_tokenizer().decode(read(data=tmp_path / "rows.jsonl").sequences[2])
    assert "First row.\nSecond row.\nFirst row." in text


def test_a_trace(
    model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(model_folder("llama", bos=True, eos_token_id=None))
    trace = capture(folder, tasks=["needle"], lengths=[250, 300], depths=[50], out=tmp_path / "t")
    assert [trace.length(s) for s in trace.sequences] == [250, 300]
    assert trace.mark_names == ("evidence", "question", "answer")
    phase = np.flatnonzero(trace.phase(0) == PHASES["continuation"])
    (answer,) = trace.marks(0)["answer"]
    assert phase.tolist() == [*answer]
    (facts,) = trace.attributes["task"]
    assert facts["lengths"] == [250, 300] and facts["seed"] == 0
    with pytest.raises(RetraceError, match=r"are to have 600 tokens, .* reads 512 positions"):
        capture(folder, tasks=["needle"], lengths=[600], out=tmp_path / "no")
    with pytest.raises(RetraceError, match=r"are to have 310 tokens, .*max_length is 300"):
        capture(
            folder,
            tasks=["needle"],
            lengths=[300],
            generate=10,
            max_length=300,
            out=tmp_path / "no",
        )
