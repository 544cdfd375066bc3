"""Queries and keys before their rotation are those that the model's projections gave."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from retrace.capture import capture
from retrace.traces import RetraceError, Rotation, Trace, to_torch

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
YARN["original_max_position_embeddings"] = 128
CASES: list[tuple[str, dict[str, Any], list[tuple[int, str]]]] = [
    ("llama", {}, [(16, "half")] * 2),
    ("llama", {"rope_parameters": YARN}, [(16, "half")] * 2),
    ("gpt_neox", {}, [(4, "half")] * 2),
    ("gptj", {}, [(8, "interleaved")] * 2),
    ("qwen3", {}, [(16, "half")] * 2),
    ("gemma3_text", {}, [(16, "half")] * 3),
    ("cohere2", {}, [(16, "interleaved"), (0, "half")]),
]
"""Architecture, changes of its configuration, rotated channels and pairing of each layer."""


def trace_of(folder: Path, text: Path, out: Path, **options: Any) -> Trace:
    options = {"limit": 1, "max_length": 60, "dtype": "float32", **options}
    return capture(str(folder), text=[text], out=out, **options)


def projected(folder: Path, tokens: Any, dtype: torch.dtype) -> dict[tuple[int, str], torch.Tensor]:
    """What the projections, or the norms after them, gave (heads, positions, channels), by layer
    and by "q" or "k"."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    outputs: dict[tuple[int, str], torch.Tensor] = {}

    def note(layer: int, name: str) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            vectors = output[0].float()
            if vectors.dim() == 2:
                vectors = vectors.unflatten(-1, (-1, 16))
            if vectors.shape[0] == len(tokens):
                vectors = vectors.transpose(0, 1)
            if name == "query_key_value":  # head by head: query, key, value
                outputs[layer, "q"], outputs[layer, "k"] = vectors[0::3], vectors[1::3]
            else:
                outputs[layer, name[0]] = vectors  # norms come later and take the place

        return hook

    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in ("q_proj", "k_proj", "q_norm", "k_norm", "query_key_value"):
            layer = int(next(part for part in path.split(".") if part.isdecimal()))
            module.register_forward_hook(note(layer, name))
    with torch.inference_mode():
        model(torch.from_numpy(tokens).long()[None], use_cache=False)
    return outputs


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    CASES,
    ids=[f"{c[0]}{'-yarn' if c[1] else ''}" for c in CASES],
)
def test_rotation_is_undone(
    model_type: str,
    changes: dict[str, Any],
    expected: list[tuple[int, str]],
    model_folder: Any,
    text_file: Path,
    tmp_path: Path,
) -> None:
    folder = model_folder(model_type, **changes)
    trace = trace_of(folder, text_file, tmp_path / "t", queries="stride:7")
    rotations = [trace.layer(i).rules.rotation for i in trace.layers]
    assert [(2 * len(r.frequencies), r.pairing) for r in rotations if r is not None] == expected
    assert all(r is not None and (r.scaling > 1) == bool(changes) for r in rotations)
    plain = projected(folder, trace.tokens(0), torch.float32)
    rows = torch.from_numpy(trace.query_positions(0)).long()
    for index in trace.layers:
        layer = trace.layer(index)
        queries = torch.from_numpy(layer.query(0, rotated=False))
        keys = torch.from_numpy(layer.key(0, rotated=False))
        torch.testing.assert_close(queries, plain[index, "q"][:, rows], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(keys, plain[index, "k"], rtol=1e-4, atol=1e-4)


def test_layers_have_frequencies_of_their_own(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    trace = trace_of(model_folder("gemma3_text"), text_file, tmp_path / "t")
    rotations = [trace.layer(i).rules.rotation for i in trace.layers]
    assert rotations[0] == rotations[1] != rotations[2]


def test_bfloat16_gives_float32(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    folder = model_folder("llama")
    trace = trace_of(folder, text_file, tmp_path / "t", dtype="bfloat16")
    plain = projected(folder, trace.tokens(0), torch.bfloat16)
    keys = trace.layer(1).key(0, slice(1, 2), rotated=False)
    assert keys.dtype == np.float32
    typical = float(plain[1, "k"].norm(dim=-1).mean())
    difference = torch.from_numpy(keys[0]) - plain[1, "k"][1]
    assert float(difference.norm(dim=-1).max()) < 2e-2 * typical
    stored = to_torch(trace.layer(1).key(0)).float().norm()
    np.testing.assert_allclose(np.linalg.norm(trace.layer(1).key(0, rotated=False)), stored, 1e-5)


def test_frequencies_that_change_with_length_are_not_believed(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    folder = model_folder("llama", rope_parameters=dynamic)
    trace = trace_of(folder, text_file, tmp_path / "t")
    assert trace.layer(0).rules.rotation is None
    with pytest.raises(RetraceError, match=r"layer 0 \(model\.layers\.0\.self_attn\) is not known"):
        trace.layer(0).key(0, rotated=False)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_undoing_and_applying(pairing: str) -> None:
    rotation = Rotation((1.0, 0.1), first=2, pairing=pairing, scaling=1.5)
    vectors = np.random.default_rng(0).normal(size=(3, 5, 8))
    positions = np.array([0, 1, 2, 50, 100_000])
    turned = rotation.apply(vectors, positions)
    np.testing.assert_array_equal(turned[..., :2], vectors[..., :2])
    np.testing.assert_array_equal(turned[..., 6:], vectors[..., 6:])
    np.testing.assert_allclose(turned[:, 0, 2:6], 1.5 * vectors[:, 0, 2:6])
    np.testing.assert_allclose(rotation.undo(turned, positions), vectors)
    first, second = rotation.pairs()[1]
    point = (vectors[..., first] + 1j * vectors[..., second]) * np.exp(0.1j * positions) * 1.5
    np.testing.assert_allclose(turned[..., first] + 1j * turned[..., second], point)
    assert Rotation.from_attributes(rotation.to_attributes()) == rotation
