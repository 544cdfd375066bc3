"""Stored queries, keys and values give what each architecture's own plain attention gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from retrace.analyze.attention import attend
from retrace.capture import capture
from retrace.traces import RetraceError, Trace, to_torch

# Architecture, name of its output projection, (window, chunk) of each layer.
ARCHITECTURES = [
    ("llama", "o_proj", [(None, None)] * 2),
    ("qwen3", "o_proj", [(None, None)] * 2),
    ("gpt_neox", "dense", [(None, None)] * 2),
    ("mistral", "o_proj", [(8, None)] * 2),
    ("gemma2", "o_proj", [(8, None), (None, None)]),
    ("gpt_oss", "o_proj", [(8, None), (None, None)]),
    ("phimoe", "o_proj", [(8, None)] * 2),
    ("llama4_text", "o_proj", [(None, 8)] * 3 + [(None, None)]),
    ("deepseek_v3", "o_proj", [(None, None)] * 2),
]


def plain_outputs(folder: Path, tokens: Any, projection: str) -> list[torch.Tensor]:
    """What enters each layer's output projection (positions, heads * channels), by the model's own
    plain attention, as float64."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    outputs: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(f"att{'ention' if projection == 'dense' else 'n'}.{projection}"):
            module.register_forward_pre_hook(
                lambda _, inputs: outputs.append(inputs[0][0].double())
            )
    with torch.inference_mode():
        model(torch.from_numpy(tokens).long()[None], use_cache=False)
    return outputs


def replayed(trace: Trace, sequence: int, index: int) -> torch.Tensor:
    """The layer's attention output (queries, heads * channels) in float64, from the trace."""
    layer = trace.layer(index)
    rules = layer.rules
    positions = torch.from_numpy(trace.query_positions(sequence)).long()
    outputs = []
    for kv_head in range(rules.kv_heads):
        heads = slice(kv_head * rules.group, (kv_head + 1) * rules.group)
        outputs.append(
            attend(
                to_torch(layer.query(sequence)[heads]).double(),
                to_torch(layer.key(sequence)[kv_head]).double(),
                to_torch(layer.value(sequence)[kv_head]).double(),
                positions,
                rules,
                None if rules.sinks is None else torch.tensor(rules.sinks[heads]).double(),
            )
        )
    return torch.cat(outputs).transpose(0, 1).flatten(1)


@pytest.mark.parametrize(
    ("model_type", "projection", "extents"), ARCHITECTURES, ids=[a[0] for a in ARCHITECTURES]
)
def test_trace_explains_attention(
    model_type: str,
    projection: str,
    extents: list[tuple[int | None, int | None]],
    model_folder: Any,
    text_file: Path,
    tmp_path: Path,
) -> None:
    folder = model_folder(model_type)
    trace = capture(
        str(folder), text=[text_file], limit=2, max_length=50, dtype="float32", out=tmp_path / "t"
    )
    rules = [trace.layer(i).rules for i in trace.layers]
    assert [(r.window, r.chunk) for r in rules] == extents
    assert [r.softcap for r in rules] == [5.0 if model_type == "gemma2" else None] * len(rules)
    assert all((r.sinks is not None) == (model_type == "gpt_oss") for r in rules)
    for sequence in trace.sequences:
        expected = plain_outputs(folder, trace.tokens(sequence), projection)
        assert len(expected) == len(trace.layers)
        for index in trace.layers:
            torch.testing.assert_close(
                replayed(trace, sequence, index), expected[index], rtol=2e-4, atol=2e-4
            )


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


REFUSED = {
    "bloom": ({"hidden_size": 64, "n_layer": 2, "n_head": 4}, "bloom models have no attention"),
    "mamba": ({"state_size": 4}, "mamba models have no attention"),
    "diffllama": ({}, r"layers\.0\.self_attn calls attention more than once .*DiffLlamaAttention"),
    "doge": ({"keep_window_size": 8}, r"layers\.0\.self_attn"),
    "glm_moe_dsa": (
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "index_topk": 8,
            "index_n_heads": 2,
            "index_head_dim": 16,
        },
        r"layers\.0\.self_attn calls attention with 'indices'",
    ),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_a_trace_cannot_describe_is_refused(
    model_type: str, model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    changes, message = REFUSED[model_type]
    folder = model_folder(model_type, **changes)
    with pytest.raises(RetraceError, match=message):
        capture(str(folder), text=[text_file], limit=1, max_length=40, out=tmp_path / "t")
    assert not (tmp_path / "t").exists()


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
