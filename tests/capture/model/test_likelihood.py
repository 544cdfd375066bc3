"""Negative log-likelihoods are those of the model's own logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from retrace.capture import capture
from retrace.capture.model import likelihood


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("block_positions", [1000, 7])
def test_against_cross_entropy(
    model_type: str,
    block_positions: int,
    model_folder: Any,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = model_folder(model_type)
    monkeypatch.setattr(likelihood, "BLOCK_ELEMENTS", 2 * 260 * block_positions)
    trace = capture(
        str(folder),
        text=[text_file],
        limit=2,
        max_length=40,
        batch_size=2,
        dtype="float32",
        out=tmp_path / "t",
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for sequence in trace.sequences:
        tokens = torch.from_numpy(trace.tokens(sequence)).long()
        with torch.inference_mode():
            logits = model(tokens[None]).logits[0].double()
        expected = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        nll = trace.nll(sequence)
        assert nll.dtype == np.float32
        assert np.isnan(nll[-1])
        np.testing.assert_allclose(nll[:-1], expected.numpy(), rtol=1e-4, atol=1e-4)


def test_a_model_that_always_computes_all_logits(model_folder: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama")).eval()
    tokens = torch.arange(20).view(2, 10)
    with torch.inference_mode():
        expected = likelihood.next_token_nll(model, tokens)
        forward = model.forward
        model.forward = lambda input_ids, use_cache: forward(input_ids=input_ids)
        found = likelihood.next_token_nll(model, tokens)
    torch.testing.assert_close(found, expected, equal_nan=True)
