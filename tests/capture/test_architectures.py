"""Stored queries, keys and values give what each architecture's own plain attention gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from benchmarks.science.architectures import TOLERANCE, try_architecture
from benchmarks.tiny_architectures import ARCHITECTURES, NOT_TRIED, TRANSFORMERS
from benchmarks.tiny_models import model_class
from benchmarks.tiny_sizes import LATENT
from retrace.capture import capture
from retrace.traces import RetraceError

EXTENTS = {
    "llama": [(None, None)] * 2,
    "mistral": [(8, None)] * 2,
    "gemma2": [(8, None), (None, None)],
    "gpt_oss": [(8, None), (None, None)],
    "phimoe": [(8, None)] * 2,
    "qwen2_moe": [(8, None), (None, None)],
    "llama4_text": [(None, 8)] * 3 + [(None, None)],
}
"""(window, chunk) of each layer."""
OWN_ATTENTION = """
big_bird bloom cpmant falcon falcon_mamba git gpt_neo gpt_neox_japanese mamba mamba2 megatron-bert
mpt mvp openai-gpt prophetnet reformer rembert roformer rwkv trocr xglm xlm xlnet xlstm
""".split()
"""Those with attention code of their own, or without attention."""
REFUSED = {
    **{name: f"{name} models have no attention that can be recorded" for name in OWN_ATTENTION},
    "bigbird_pegasus": "decoder.layers.0.self_attn is not causal",
    "blt": "local_encoder.cross_attn_layers.0 adds a float32 mask to its scores",
    "deepseek_v4": "layers.0.self_attn attends to compressed keys, which are no token's",
    "diffllama": "layers.0.self_attn calls attention more than once for a token (DiffLlama",
    "doge": "layers.0.self_attn adds a float32 mask to its scores",
    "dory": "layers.0.self_attn calls attention more than once for a token (Dory",
    "emu3": "emu3 lacks 21 of the weights of Emu3ForCausalLM",
    "gemma4_assistant": "gemma4_assistant does not read token ids alone",
    "gemma4_unified_assistant": "gemma4_unified_assistant does not read token ids alone",
    "hrm_text": "layers.0.self_attn calls attention more than once for a token (HrmText",
    "inkling_text": "layers.0.self_attn calls attention with 'position_bias'",
    "inkling2_text": "layers.0.self_attn calls attention with 'position_bias'",
    "inkling2_loop_text": "layers.0.self_attn calls attention with 'position_bias'",
    "musicgen": "musicgen is made of several models",
    "musicgen_melody": "musicgen_melody is made of several models",
    "t5": "t5 holds no causal language model",
}
LATENT_FAMILIES = sorted(
    name
    for name, config in ARCHITECTURES.items()
    if config.keys() >= LATENT.keys() and name not in REFUSED
)


def test_every_causal_language_model_is_named() -> None:
    """In the table of `benchmarks/tiny_architectures.py`, or there as not tried."""
    named = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    unknown = sorted(named - ARCHITECTURES.keys() - NOT_TRIED.keys())
    if transformers.__version__ != TRANSFORMERS:
        pytest.skip(
            f"the table is of transformers {TRANSFORMERS}, and {transformers.__version__} is "
            f"installed, which has further models: {', '.join(unknown) or 'none'}"
        )
    assert not unknown, f"transformers has models that the table lacks: {', '.join(unknown)}"
    assert not ARCHITECTURES.keys() & NOT_TRIED.keys()
    assert NOT_TRIED.keys() <= named
    others = ARCHITECTURES.keys() - named
    assert all(name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES for name in others - {"t5"})


def test_trace_explains_attention(architecture: str, tmp_path: Path) -> None:
    outcome = try_architecture(architecture, tmp_path)
    if architecture in REFUSED:
        assert REFUSED[architecture] in outcome.refusal
        return
    assert not outcome.refusal
    assert outcome.error <= TOLERANCE
    assert outcome.sensitivity > 100 * TOLERANCE


@pytest.mark.parametrize("model_type", EXTENTS)
def test_rules_of_each_kind(
    model_type: str, model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    folder = model_folder(model_type)
    trace = capture(str(folder), text=[text_file], limit=1, max_length=50, out=tmp_path / "t")
    rules = [trace.layer(i).rules for i in trace.layers]
    assert [(r.window, r.chunk) for r in rules] == EXTENTS[model_type]
    assert [r.softcap for r in rules] == [5.0 if model_type == "gemma2" else None] * len(rules)
    assert all((r.sinks is not None) == (model_type == "gpt_oss") for r in rules)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_shared_keys_are_noted(
    model_type: str, model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    folder = model_folder(model_type)
    trace = capture(str(folder), text=[text_file], limit=1, max_length=40, out=tmp_path / "t")
    assert [trace.layer(i).rules.kv_source for i in trace.layers] == [None, None, 0, 1]
    np.testing.assert_array_equal(trace.layer(2).key(0), trace.layer(0).key(0))


def test_shapes_follow_the_model(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    folder = model_folder("deepseek_v3")
    trace = capture(str(folder), text=[text_file], limit=1, max_length=20, out=tmp_path / "t")
    layer = trace.layer(1)
    assert layer.query(0).shape == (4, 20, 24)
    assert layer.key(0).shape == (4, 20, 24)
    assert layer.value(0).shape == (4, 20, 12)
    assert layer.rules.module == "model.layers.1.self_attn"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype: str, model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    folder = model_folder("gemma2")
    trace = capture(
        str(folder), text=[text_file], limit=1, max_length=40, dtype=dtype, out=tmp_path / "t"
    )
    assert trace.attributes["dtype"] == dtype
    assert trace.layer(0).key(0).dtype == trace.dtype


def test_a_model_that_needs_more_than_tokens(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    folder = model_folder("xmod", default_language=None)
    with pytest.raises(RetraceError, match=r"xmod does not read token ids alone.*language"):
        capture(str(folder), text=[text_file], limit=1, max_length=40, out=tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_auto_dtype_is_the_checkpoints(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16)
    folder = tmp_path / "half"
    model.save_pretrained(folder)
    for file in model_folder("llama").glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    trace = capture(str(folder), text=[text_file], limit=1, max_length=40, out=tmp_path / "t")
    assert trace.attributes["dtype"] == "bfloat16"


def test_layers_without_attention_are_listed(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    folder = model_folder(
        "lfm2", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], conv_L_cache=3
    )
    trace = capture(str(folder), text=[text_file], limit=1, max_length=40, out=tmp_path / "t")
    assert trace.layers == (1,)
    assert trace.attributes["unrecorded_layers"] == [0, 2]


def test_batch_size_changes_nothing(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    text_file.write_text(text_file.read_text()[:110])  # sequences of 40, 40 and 30 tokens
    traces = [
        capture(
            str(model_folder("mistral")),
            text=[text_file],
            max_length=40,
            batch_size=batch_size,
            queries="stride:8",
            out=tmp_path / f"{batch_size}",
        )
        for batch_size in (1, 3)
    ]
    assert [traces[0].length(s) for s in traces[0].sequences] == [40, 40, 30]
    for sequence in traces[0].sequences:
        one, three = (
            [
                *(getattr(t.layer(1), name)(sequence) for name in ("query", "key", "value")),
                t.nll(sequence),
            ]
            for t in traces
        )
        for a, b in zip(one, three, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", LATENT_FAMILIES)
def test_latent_caches(model_type: str, model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    """A token takes in the trace's rules what it does in the model's own cache in bfloat16."""
    folder = model_folder(model_type)
    trace = capture(str(folder), text=[text_file], limit=1, max_length=20, out=tmp_path / "t")
    model = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=torch.bfloat16
    )
    with torch.inference_mode():
        cache = model(torch.from_numpy(trace.tokens(0)).long()[None], use_cache=True)
    layers = [
        layer for layer in cache.past_key_values.layers if getattr(layer, "keys", None) is not None
    ]
    assert len(layers) == len(trace.layers)
    for index, layer in zip(trace.layers, layers, strict=True):
        rules = trace.layer(index).rules
        assert rules.cached_bytes == (16 + 8) * 2 == (layer.keys.nbytes + layer.values.nbytes) / 20
        assert "cached_bytes" in rules.to_attributes()


def test_other_caches_are_keys_and_values(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    folder = model_folder("llama")
    trace = capture(str(folder), text=[text_file], limit=1, max_length=20, out=tmp_path / "t")
    assert trace.layer(0).rules.cached_bytes is None
    assert "cached_bytes" not in trace.layer(0).rules.to_attributes()
