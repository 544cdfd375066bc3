"""Checkpoints that are damaged, incomplete or of another kind are refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrace.capture import capture
from retrace.traces import RetraceError


@pytest.fixture
def folder(model_folder: Any, tmp_path: Path) -> Path:
    """A copy of a good model folder, to be spoilt."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate_the_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def add_a_weight(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = torch.ones(64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop_the_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


def bring_code(folder: Path) -> None:
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("")


def be_another_kind(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))


def change_the_configuration(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def say_null_for_a_number(folder: Path) -> None:
    change_the_configuration(folder, max_position_embeddings=None)


def say_text_for_a_number(folder: Path) -> None:
    change_the_configuration(folder, rms_norm_eps="small")


def say_other_shapes(folder: Path) -> None:
    change_the_configuration(folder, num_key_value_heads=1)


def cut_the_vocabulary(folder: Path) -> None:
    change_the_configuration(folder, vocab_size=100)
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:100].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_a_weight, r"lacks 1 of the weights of LlamaForCausalLM, model\.layers\.1.*k_proj"),
        (truncate_the_weights, "holds no causal language model"),
        (drop_the_tokenizer, "holds no tokenizer"),
        (bring_code, "--trust-remote-code"),
        (be_another_kind, r"holds no causal language model .*T5Config"),
        (say_null_for_a_number, "max_position_embeddings"),
        (say_text_for_a_number, "rms_norm_eps"),
        (
            say_other_shapes,
            r"layers\.0\.self_attn\.k_proj\.weight has shape \(32, 64\).*\(16, 64\)",
        ),
        (cut_the_vocabulary, r"gives token \d+, and LlamaForCausalLM has embeddings for 100"),
    ],
)
def test_refused(spoil: Any, message: str, folder: Path, text_file: Path, tmp_path: Path) -> None:
    spoil(folder)
    with pytest.raises(RetraceError, match=message) as refusal:
        capture(str(folder), text=[text_file], limit=1, out=tmp_path / "t")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.q_proj.bias",
        "self_attn.q_proj.lora_A.weight",
        "self_attn.q_proj.weight_scale",
        "self_attn.q_norm.weight",
        "mlp.gate.weight",
        "input_layernorm.bias",
    ],
)
def test_weights_that_would_be_left_out(
    name: str, folder: Path, text_file: Path, tmp_path: Path
) -> None:
    add_a_weight(folder, f"model.layers.1.{name}")
    with pytest.raises(RetraceError, match=rf"has a weight model\.layers\.1\.{name} that Llama"):
        capture(str(folder), text=[text_file], limit=1, out=tmp_path / "t")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("visual.blocks.0.weight", True),
        ("model.layers.2.mlp.up_proj.weight", True),
        ("value_head.weight", True),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", False),
        ("model.layers.1.self_attn.masked_bias", False),
        ("model.layers.1.self_attn.bias", False),
    ],
)
def test_weights_that_the_text_model_does_without(
    name: str,
    said: bool,
    folder: Path,
    text_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    add_a_weight(folder, name)
    capture(str(folder), text=[text_file], limit=1, max_length=20, out=tmp_path / "t")
    assert (f"1 weights that LlamaForCausalLM leaves out, {name} first" in caplog.text) is said
