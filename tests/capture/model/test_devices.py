"""A model that is spread over several places is recorded from each layer's own.

Without GPUs the places are the CPU and a folder on disk, from which accelerate brings a layer's
weights when it runs: parameters are then on the device `meta`, and hooks stand before each layer.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from retrace.capture.attention.interface import observed_attention
from retrace.capture.attention.recorder import RecordedSequence, TensorRecorder
from retrace.capture.checks.trace import examine
from retrace.capture.model.likelihood import next_token_nll
from retrace.capture.model.loading import input_device


class Kept:
    """Keeps what it is given to write."""

    def __init__(self) -> None:
        self.tensors: dict[int, list[Any]] = {}

    def write_layer(self, sequence: int, layer: int, query: Any, key: Any, value: Any) -> None:
        self.tensors[layer] = [query, key, value]


def recorded(model: Any, tokens: Any) -> tuple[dict[int, Any], dict[int, list[Any]], torch.Tensor]:
    """Layers, tensors of each, and negative log-likelihoods of one sequence."""
    layers = examine(model, tokens)
    kept = Kept()
    recorder = TensorRecorder(kept, layers)
    with torch.inference_mode(), observed_attention(model, recorder):
        recorder.start([RecordedSequence(0, 0, len(tokens), np.arange(0, len(tokens), 3))])
        batch = torch.from_numpy(tokens).long()[None].to(input_device(model))
        nll = next_token_nll(model, batch)
        recorder.finish()
    return layers, kept.tensors, nll


def test_offloaded_layers(model_folder: Any, tmp_path: Path) -> None:
    folder = model_folder("mistral")
    tokens = np.arange(3, 43, dtype=np.int32)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offloaded"
    ).eval()
    assert spread.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    layers, expected, nll = recorded(whole, tokens)
    spread_layers, found, spread_nll = recorded(spread, tokens)
    assert [layer.rules for layer in spread_layers.values()] == [
        layer.rules for layer in layers.values()
    ]
    assert all(layer.rules.rotation is not None for layer in layers.values())
    torch.testing.assert_close(spread_nll, nll, equal_nan=True)
    for index in expected:
        for one, other in zip(found[index], expected[index], strict=True):
            np.testing.assert_array_equal(one, other)
