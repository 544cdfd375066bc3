"""The output projection W_o of a layer, in the trace or said to be none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.science.architectures import replayed
from retrace.capture import capture
from retrace.capture.checks.trace import examine, examine_projections
from retrace.traces import OutputProjection, Trace, open_trace, verify_trace

TOKENS = np.arange(3, 43, dtype=np.int32)
OUTPUTS = {"llama": "o_proj", "gpt2": "c_proj", "phi": "dense", "deepseek_v3": "o_proj"}
"""What a family calls it. GPT-2's is transposed, GPT-2's and Phi's have biases, and the values of
DeepSeek-V3 have other channels than its keys."""
ModelFolder = Callable[..., Path]


@pytest.fixture
def trace_of(model_folder: ModelFolder, text_file: Path, tmp_path: Path) -> Callable[..., Trace]:
    """A function that captures a tiny model."""

    def of(model_type: str, **options: Any) -> Trace:
        settings = {"limit": 1, "max_length": 40, "dtype": "float32", **options}
        out = tmp_path / f"{model_type}.zarr"
        return capture(str(model_folder(model_type)), text=[text_file], out=out, **settings)

    return of


@pytest.mark.parametrize("model_type", OUTPUTS)
def test_it_gives_what_the_attention_module_returns(
    model_type: str, trace_of: Any, model_folder: ModelFolder
) -> None:
    trace = trace_of(model_type)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(model_type)).eval()
    returned: dict[str, torch.Tensor] = {}
    for index in trace.layers:
        path = trace.layer(index).rules.module
        model.get_submodule(path).register_forward_hook(
            lambda module, inputs, output, path=path: returned.update({path: output[0]})
        )
    with torch.inference_mode():
        model(torch.from_numpy(trace.tokens(0)).long()[None], use_cache=False)
    for index in trace.layers:
        layer = trace.layer(index)
        weights = layer.output_projection
        assert weights is not None and weights.dtype == trace.dtype
        assert weights.shape == (64, layer.rules.heads, layer.rules.value_dim)
        module = layer.attributes["output_projection"]
        assert module == f"{layer.rules.module}.{OUTPUTS[model_type]}"
        attended = replayed(trace, 0, index).numpy()
        projected = np.einsum("ohc,phc->po", weights.astype(np.float64), attended)
        if (bias := model.get_submodule(module).bias) is not None:
            projected += bias.detach().numpy()
        expected = returned[layer.rules.module][0].numpy()
        np.testing.assert_allclose(projected, expected, atol=1e-4 * np.abs(expected).max())
    assert verify_trace(trace).whole


@pytest.mark.parametrize("model_type", ["afmoe", "bitnet", "qwen3_next"])
def test_more_than_a_product_is_left_out(model_type: str, trace_of: Any) -> None:
    trace = trace_of(model_type)
    for index in trace.layers:
        layer = trace.layer(index)
        assert layer.output_projection is None and not layer.has_output_projection
        assert isinstance(layer.attributes["no_output_projection"], str)
        assert not (trace.path / f"layers/{index}/output_projection").exists()


def test_bfloat16(trace_of: Any, model_folder: ModelFolder) -> None:
    trace = trace_of("llama", dtype="bfloat16")
    weights = trace.layer(1).output_projection
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16)
    expected = model.model.layers[1].self_attn.o_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(weights.astype(np.float32).reshape(64, 64), expected)


def test_only_recorded_layers_have_one(trace_of: Any) -> None:
    trace = trace_of("llama", layers=[1])
    assert trace.layers == (1,) and trace.layer(1).has_output_projection


class Adapted(torch.nn.Linear):
    """Weights and something beside them, as quantised and adapted layers have."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Twice the product."""
        return 2 * super().forward(input)


class Narrow(torch.nn.Linear):
    """What takes no more than so many positions."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product."""
        if input.shape[1] > 40:
            raise ValueError
        return super().forward(input)


@pytest.fixture
def model(model_folder: ModelFolder) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32).eval()


def examined(model: Any) -> OutputProjection | str:
    return examine_projections(model, examine(model, TOKENS), TOKENS)[0]


def weights_of(model: Any) -> npt.NDArray[np.float32]:
    weights: npt.NDArray[np.float32] = model.model.layers[0].self_attn.o_proj.weight
    return weights.detach().numpy().reshape(64, 4, 16)


def test_other_modules_are_asked_for_their_weights(model: Any) -> None:
    model.model.layers[0].self_attn.o_proj.__class__ = Adapted
    projection = examined(model)
    assert isinstance(projection, OutputProjection)
    np.testing.assert_array_equal(projection.read(), 2 * weights_of(model))


def test_other_modules_with_a_bias_are_left_out(model: Any) -> None:
    module = model.model.layers[0].self_attn.o_proj
    module.__class__, module.bias = Adapted, torch.nn.Parameter(torch.ones(64))
    assert examined(model) == "the weights of Adapted cannot be told from its bias"


def test_weights_that_do_not_give_the_output_are_left_out(model: Any) -> None:
    module = model.model.layers[0].self_attn.o_proj
    module.forward = lambda given: 2 * torch.nn.functional.linear(given, module.weight)
    projection = examined(model)
    assert isinstance(projection, str) and projection.startswith("its weights do not give what it")


def test_modules_that_cannot_be_asked_are_left_out(model: Any) -> None:
    module = model.model.layers[0].self_attn.o_proj
    module.__class__ = Narrow
    assert examined(model) == "its weights cannot be read (ValueError)"


def test_weights_of_another_type_are_left_out(model: Any) -> None:
    module = model.model.layers[0].self_attn.o_proj.to(torch.float64)
    module.register_forward_pre_hook(lambda module, given: (given[0].double(),))
    module.register_forward_hook(lambda module, given, output: output.float())
    projection = examined(model)
    assert isinstance(projection, str)


def test_damage_is_told_and_costs_no_sequence(trace_of: Any) -> None:
    trace = trace_of("llama")
    chunk = trace.path / "layers/0/output_projection/c/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[7] ^= 1
    chunk.write_bytes(data)
    found = verify_trace(open_trace(trace.path))
    assert [(d.layer, d.tensor, d.cause) for d in found.damages] == [
        (0, "output_projection", "checksum does not match")
    ]
    assert found.whole_sequences == (0,) and found.whole_layers == (1,)
    chunk.unlink()
    (damage,) = verify_trace(open_trace(trace.path)).damages
    assert "missing" in damage.cause
    (trace.path / "layers/0/output_projection/zarr.json").unlink()
    (damage,) = verify_trace(open_trace(trace.path)).damages
    assert "its zarr.json is missing" in damage.cause
