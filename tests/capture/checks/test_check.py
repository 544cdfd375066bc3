"""A capture that does not explain the model is refused, and leaves nothing behind."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from retrace.capture import capture
from retrace.capture.attention import interface, recorder
from retrace.capture.attention.interface import NAME, observed_attention
from retrace.capture.checks import trace as check
from retrace.capture.checks.trace import examine
from retrace.traces import RetraceError


def run(model_folder: Any, text_file: Path, out: Path, **changes: Any) -> None:
    options = {"limit": 1, "max_length": 40, **changes}
    capture(str(model_folder("mistral")), text=[text_file], out=out, **options)


def test_wrong_rules_are_found(
    model_folder: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_rules = recorder.read_rules

    def wrong(*call: Any) -> Any:
        rules = read_rules(*call)
        return dataclasses.replace(rules, softcap=30.0) if "1" in rules.module else rules

    monkeypatch.setattr(recorder, "read_rules", wrong)
    with pytest.raises(RetraceError, match=r"Layer 1 \(model\.layers\.1\.self_attn\).*difference"):
        run(model_folder, text_file, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_logits_that_change_with_the_implementation_are_found(
    model_folder: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the mask builder of the stock implementation were not that of the recorder.
    monkeypatch.setitem(
        interface.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda **options: None
    )
    stock = check._stock_logits
    monkeypatch.setattr(check, "_stock_logits", lambda *call: stock(*call) * 1.01)
    with pytest.raises(RetraceError, match=r"not the window of 8|other logits"):
        run(model_folder, text_file, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_numbers_that_are_not_finite_are_found(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder("mistral"))
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.fill_(1e30)
        model.model.layers[1].self_attn.q_proj.weight.fill_(1e30)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for file in model_folder("mistral").glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RetraceError, match=r"layers\.1\.self_attn|other logits"):
        capture(str(folder), text=[text_file], limit=1, max_length=40, out=tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_stock_attention_is_restored(model_folder: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder("mistral")).eval()
    before = model.config._attn_implementation
    layers = examine(model, np.arange(40, dtype=np.int32))
    assert sorted(layers) == [0, 1]
    assert model.config._attn_implementation == before

    def fail(call: Any) -> None:
        assert model.config._attn_implementation == NAME
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), observed_attention(model, fail):
        model(torch.arange(5)[None])
    assert model.config._attn_implementation == before


def test_each_part_of_a_model_gets_its_own_attention_back(model_folder: Any) -> None:
    """The tower for sound has no other than the plain one, and refuses that of the others."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("gemma4")).eval()
    parts = {"": model.config} | {
        name: getattr(model.config, name) for name in model.config.sub_configs
    }
    before = {name: part._attn_implementation for name, part in parts.items()}
    assert before["audio_config"] == "eager" != before["text_config"]
    examine(model, np.arange(40, dtype=np.int32))
    assert {name: part._attn_implementation for name, part in parts.items()} == before


def test_plain_attention_in_blocks(model_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder("gpt_oss")).eval()
    tokens = torch.arange(3, 43)[None]
    with torch.inference_mode():
        expected = model(tokens).logits
        monkeypatch.setattr(interface, "EAGER_ELEMENTS", 4 * 40 * 7)
        with observed_attention(model, lambda call: None):
            found = model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_layers_that_are_not_there(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RetraceError, match="no attention in layer 7; it has some in 0, 1"):
        run(model_folder, text_file, tmp_path / "t", layers=[0, 7])


def test_a_sequence_longer_than_the_model_reads(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(RetraceError, match="reads 512 positions at most"):
        run(model_folder, text_file, tmp_path / "t", max_length=513)
