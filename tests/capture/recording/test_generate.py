"""Decoding steps are recorded as a full forward over the same tokens would show them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.tiny_models import byte_tokenizer
from retrace.capture import Progress, capture
from retrace.traces import PHASES, RetraceError, Trace, open_trace

CheckTrace = Callable[[Trace, Any], None]
GENERATED = PHASES["generated"]
# Far from the end token, that sequences be long.
ENDLESS = {"eos_token_id": None}


@pytest.mark.parametrize("prompt", [30, 5], ids=["long prompt", "prompt within the window"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_against_one_forward(
    model_type: str,
    prompt: int,
    model_folder: Any,
    text_file: Path,
    tmp_path: Path,
    check_against_one_forward: CheckTrace,
) -> None:
    folder = model_folder(model_type, **ENDLESS)
    trace = capture(
        str(folder),
        text=[text_file],
        limit=2,
        generate=12,
        max_length=prompt + 12,
        dtype="float32",
        out=tmp_path / "t",
    )
    assert [len(trace.tokens(s)) for s in trace.sequences] == [prompt + 12] * 2
    assert trace.phase(0).tolist() == [0] * prompt + [GENERATED] * 12
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    check_against_one_forward(trace, model)


def test_tokens_are_those_of_greedy_generation(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    folder = model_folder("llama", **ENDLESS)
    trace = capture(
        str(folder), text=[text_file], limit=1, generate=9, max_length=29, out=tmp_path / "t"
    )
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.from_numpy(trace.tokens(0)[:20]).long()[None]
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False
    )
    assert trace.tokens(0).tolist() == expected[0].tolist()


def test_an_end_token_ends_a_sequence(
    model_folder: Any, text_file: Path, tmp_path: Path, check_against_one_forward: CheckTrace
) -> None:
    options: dict[str, Any] = {"text": [text_file], "limit": 1, "generate": 9, "max_length": 29}
    free = capture(str(model_folder("llama", **ENDLESS)), out=tmp_path / "free", **options)
    generated = free.tokens(0)[20:].tolist()
    end = generated[3]
    first = generated.index(end)
    folder = model_folder("llama", eos_token_id=end)
    trace = capture(str(folder), out=tmp_path / "t", queries="last:2", **options)
    assert trace.tokens(0)[20:].tolist() == generated[: first + 1]
    # The end of the prompt is kept besides; here that is all of it.
    assert trace.query_positions(0).tolist() == sorted({*range(20), 20 + first - 1, 20 + first})
    check_against_one_forward(trace, AutoModelForCausalLM.from_pretrained(folder).eval())


class Stop(Exception):
    """Ends a capture from within."""


def test_resume_keeps_what_was_generated(
    model_folder: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(progress: Callable[[Progress], None] | None = None, **changes: Any) -> Trace:
        options = {"limit": 3, "generate": 6, "max_length": 26, "out": tmp_path / "t", **changes}
        folder = str(model_folder("mistral", **ENDLESS))
        return capture(folder, text=[text_file], progress=progress, **options)

    monkeypatch.setattr("retrace.traces.bundles.BUNDLE_POSITIONS", 26)  # a shard each
    whole = run(out=tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.sequences:
            raise Stop

    with pytest.raises(Stop):
        run(stop)
    assert open_trace(tmp_path / "t").sequences == (0,)
    with pytest.raises(RetraceError, match="other capture"):
        run(resume=True, generate=5)
    monkeypatch.setattr(
        "retrace.capture.recording.decode._continue", None
    )  # nothing is generated again
    trace = run(resume=True)
    for s in range(3):
        assert trace.tokens(s).tolist() == whole.tokens(s).tolist()
        np.testing.assert_array_equal(trace.nll(s), whole.nll(s))
        for i in trace.layers:
            np.testing.assert_array_equal(trace.layer(i).query(s), whole.layer(i).query(s))
            np.testing.assert_array_equal(trace.layer(i).key(s), whole.layer(i).key(s))


def test_drawn_tokens(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    folder = str(model_folder("llama", **ENDLESS))

    def run(name: str, **changes: Any) -> Trace:
        options = {"limit": 3, "generate": 12, "max_length": 32, "temperature": 1.0, **changes}
        return capture(folder, text=[text_file], out=tmp_path / name, **options)

    def written(trace: Trace) -> list[list[int]]:
        return [trace.tokens(s)[20:].tolist() for s in trace.sequences]

    drawn = run("drawn")
    assert drawn.attributes["capture"]["sampling"] == {"temperature": 1.0, "top_p": 1.0, "seed": 0}
    assert written(run("again", batch_size=2)) == written(drawn)
    # What is drawn for a sequence does not depend on how many there are.
    assert written(run("fewer", limit=1)) == written(drawn)[:1]
    assert written(run("other", seed=1)) != written(drawn)
    greedy = run("greedy", temperature=0.0)
    assert "sampling" not in greedy.attributes["capture"]
    assert written(greedy) != written(drawn)
    # The likeliest alone is left.
    assert written(run("narrow", top_p=1e-9)) == written(greedy)
    assert written(run("cold", temperature=1e-9)) == written(greedy)
    with pytest.raises(RetraceError, match="other capture"):
        run("drawn", resume=True, seed=1)
    # A run over the same tokens has them.
    again = capture(reference=drawn.path, approximate="window", topk=4, out=tmp_path / "loop")
    assert written(again) == written(drawn)
    with pytest.raises(RetraceError, match="give generate with it"):
        capture(reference=drawn.path, temperature=0.5, out=tmp_path / "loop")


def test_what_ends_a_text(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    folder = str(model_folder("llama", **ENDLESS))
    options: dict[str, Any] = {"text": [text_file], "limit": 1, "generate": 9, "max_length": 29}
    free = capture(folder, out=tmp_path / "free", **options).tokens(0)[20:].tolist()
    decode = byte_tokenizer().decode
    stop = decode(free[3:5])
    end = next(n for n in range(1, 10) if stop in decode(free[:n]))
    trace = capture(folder, out=tmp_path / "t", stop=["never there", stop], **options)
    assert trace.tokens(0)[20:].tolist() == free[:end]  # what ends it is kept
    assert trace.attributes["capture"]["sampling"] == {"stop": ["never there", stop]}


def test_no_room_for_a_prompt(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RetraceError, match="generate cannot be 19"):
        capture(
            str(model_folder("llama")),
            text=[text_file],
            generate=19,
            max_length=20,
            out=tmp_path / "t",
        )
