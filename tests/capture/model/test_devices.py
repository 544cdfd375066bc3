"""A model that is spread over several places is recorded from each layer's own.

Without GPUs the places are the CPU and a folder on disk, from which accelerate brings a layer's
weights when it runs: parameters are then on the device `meta`, and hooks stand before each layer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from retrace.capture import CaptureSettings, capture, evaluate
from retrace.capture.attention.interface import observed_attention
from retrace.capture.attention.recorder import RecordedSequence, TensorRecorder
from retrace.capture.checks.trace import examine
from retrace.capture.model.likelihood import next_token_nll
from retrace.capture.model.loading import input_device
from retrace.capture.reading.sequences import like_reference
from retrace.capture.recording.identity import weights_digest
from retrace.traces import RetraceError, Trace


class Kept:
    """Keeps what it is given to write."""

    def __init__(self) -> None:
        self.tensors: dict[int, list[Any]] = {}

    def write_layer(self, sequence: int, layer: int, tensors: Mapping[str, Any]) -> None:
        self.tensors[layer] = [tensors[name] for name in ("query", "key", "value")]


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


SPREAD = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
SPREAD |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}


def same(found: Trace, expected: Trace) -> None:
    """The same bytes of queries, keys, values and likelihoods, of a model of the same weights."""
    assert found.sequences == expected.sequences
    for sequence in expected.sequences:
        np.testing.assert_array_equal(found.nll(sequence), expected.nll(sequence))
        for index in expected.layers:
            one, other = found.layer(index), expected.layer(index)
            assert one.rules == other.rules
            for tensor in ("query", "key", "value"):
                np.testing.assert_array_equal(
                    getattr(one, tensor)(sequence), getattr(other, tensor)(sequence)
                )
    assert found.attributes["model"] == expected.attributes["model"]


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", "cpu", SPREAD])
def test_what_one_device_gives(
    device_map: Any, model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"text": [text_file], "limit": 2, "max_length": 48}
    folder = str(model_folder("llama"))
    expected = capture(folder, **options, out=tmp_path / "whole")
    found = capture(folder, **options, device_map=device_map, out=tmp_path / "spread")
    same(found, expected)
    assert found.attributes["device_map"] == device_map
    assert expected.attributes["device_map"] is None


def test_weights_on_the_disk(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    """Those that no file of the model has as they are, such as of another type, are put there."""
    options: dict[str, Any] = {"text": [text_file], "limit": 1, "max_length": 48}
    options |= {"dtype": "bfloat16", "generate": 3, "approximate": "quest:page=4", "topk": 8}
    folder = str(model_folder("mistral"))
    expected = capture(folder, **options, out=tmp_path / "whole")
    found = capture(
        folder,
        **options,
        device_map=SPREAD,
        model_args={"offload_folder": str(tmp_path / "offloaded")},
        out=tmp_path / "spread",
    )
    same(found, expected)


def test_weights_beside_the_device(model_folder: Any) -> None:
    """As on the CPU beside a GPU: weights are kept there, and brought when a module runs."""
    folder = model_folder("llama", tie_word_embeddings=True)
    tokens = np.arange(3, 43, dtype=np.int32)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    beside = AutoModelForCausalLM.from_pretrained(folder).eval()
    accelerate.cpu_offload(beside, execution_device=torch.device("cpu"))
    assert {p.device.type for p in beside.parameters()} == {"meta"}
    assert weights_digest(beside) == weights_digest(whole)
    assert input_device(beside) == torch.device("cpu")
    with torch.no_grad():
        whole.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    assert weights_digest(beside) != weights_digest(whole)
    _, found, _ = recorded(beside, tokens)
    assert len(found) == 2
    assert {p.device.type for p in beside.parameters()} == {"meta"}


def test_the_body_is_dispatched_afterwards(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    """A method in the loop stands in for the body meanwhile, which has a hook of its own here."""
    options: dict[str, Any] = {"text": [text_file], "limit": 2, "max_length": 48}
    options |= {"approximate": "quest:page=4", "topk": 8}
    folder = str(model_folder("llama"))
    expected = capture(folder, **options, out=tmp_path / "whole")
    places = {"model": "disk", "lm_head": "cpu"}
    same(capture(folder, **options, device_map=places, out=tmp_path / "spread"), expected)


def test_a_reference_says_how_it_was_spread(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    folder = str(model_folder("llama"))
    exact = capture(
        folder, text=[text_file], limit=3, max_length=48, device_map=SPREAD, out=tmp_path / "exact"
    )
    like = lambda **more: like_reference(  # noqa: E731
        exact, CaptureSettings(reference=exact.path, **more)
    )
    assert like().device_map == SPREAD
    assert like(device="cpu").device_map is None
    assert like(device_map="auto").device_map == "auto"
    costs = evaluate(exact, ["quest:page=4"], [8], out=tmp_path / "costs")
    assert np.isfinite(costs.points["difference"]).all()


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        (
            {"model.norm": "disk", "lm_head": "cpu"},
            "cannot be spread over devices so: .*name a device for",
        ),
        ({"": "cuda:99"}, "cuda:99"),
        ({"": 99}, "cuda:99"),
    ],
)
def test_a_map_that_does_not_fit(
    device_map: Any, message: str, model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(RetraceError, match=message) as refusal:
        capture(
            str(model_folder("llama")), text=[text_file], device_map=device_map, out=tmp_path / "t"
        )
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "t").exists()


def test_several_processes_have_a_device_each(
    model_folder: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RetraceError, match="start one process, or leave device_map out"):
        capture(str(model_folder("llama")), text=[text_file], device_map="auto", out=tmp_path / "t")
