"""Models of 4 and 8 bits are recorded, known again, and taken up by who refers to them."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import Tensor

from retrace.capture import CaptureSettings, capture, evaluate
from retrace.capture.model.loading import open_checkpoint
from retrace.capture.recording.identity import weights_digest
from retrace.traces import RetraceError

FOUR = "load_in_4bit=True,bnb_4bit_quant_type=nf4,bnb_4bit_compute_dtype=float32"
BITS = pytest.mark.parametrize("arguments", [FOUR, "load_in_8bit=True"], ids=["4 bits", "8 bits"])


@pytest.fixture
def options(text_file: Path) -> dict[str, Any]:
    return {"text": [text_file], "limit": 2, "max_length": 48}


def loaded(folder: Path, arguments: Any) -> Any:
    settings = CaptureSettings(pretrained=str(folder), tasks=["wikitext"], model_args=arguments)
    return open_checkpoint(settings).load("auto", "cpu")


def weight(model: Any) -> Tensor:
    found: Tensor = model.model.layers[0].self_attn.q_proj.weight
    return found


@BITS
def test_what_is_recorded(
    arguments: str, options: dict[str, Any], model_folder: Any, tmp_path: Path
) -> None:
    folder = model_folder("llama")
    whole = capture(str(folder), **options, out=tmp_path / "whole")
    found = capture(str(folder), **options, model_args=arguments, out=tmp_path / "few bits")
    model = loaded(folder, arguments)
    assert weight(model).dtype in (torch.uint8, torch.int8)
    assert found.attributes["dtype"] == "float32"
    told = found.attributes["model"]
    assert told["arguments"].items() >= {arguments.split("=")[0]: True}.items()
    assert told["parameters"] == whole.attributes["model"]["parameters"]
    assert told["weights"] == weights_digest(model) != whole.attributes["model"]["weights"]
    tokens = torch.from_numpy(found.tokens(0)).long()[None]
    with torch.inference_mode():
        logits = model(input_ids=tokens).logits[0]
    # It has run since: where a CPU multiplies bfloat16, bitsandbytes then packs 4 bits anew and
    # rounds their scales.
    packed = arguments == FOUR and has_avx512bf16()
    assert (told["weights"] != weights_digest(model)) == packed
    nll = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")
    np.testing.assert_allclose(found.nll(0)[:-1], nll.numpy(), rtol=1e-3, atol=1e-2)
    near, far = (np.abs(one.nll(0) - whole.nll(0))[:-1].mean() for one in (whole, found))
    assert near < far < 1.5  # nats; another rounding, and the same model


@BITS
def test_it_runs_in_every_way(
    arguments: str, options: dict[str, Any], model_folder: Any, tmp_path: Path
) -> None:
    folder = str(model_folder("llama"))
    exact = capture(
        folder, **options, generate=4, batch_size=2, model_args=arguments, out=tmp_path / "exact"
    )
    reference = capture(
        reference=exact.path, approximate="quest:page=4", topk=8, out=tmp_path / "quest"
    )
    assert reference.attributes["model"] == exact.attributes["model"]
    costs = evaluate(exact, ["quest:page=4"], [8], out=tmp_path / "costs")
    assert np.isfinite(costs.points["difference"]).all()


def test_other_bits_do_not_go_on(
    options: dict[str, Any], model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(model_folder("llama"))
    out = tmp_path / "t"
    capture(folder, **options, model_args=FOUR, out=out)
    for other in ("load_in_8bit=True", None):
        with pytest.raises(RetraceError, match=r"is not the one that .* was captured with"):
            capture(folder, **options, model_args=other, out=out, resume=True)
    assert capture(folder, **options, model_args=FOUR, out=out, resume=True).sequences == (0, 1)


def test_without_bitsandbytes(
    options: dict[str, Any], model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *of: None if name == "bitsandbytes" else find(name, *of),
    )
    with pytest.raises(RetraceError, match=r"pip install 'retrace-attention\[quantized\]'"):
        capture(str(model_folder("llama")), **options, model_args=FOUR, out=tmp_path / "t")


@pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None,
    reason="needs `pip install torchao`, which warns of itself and takes seconds to import",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_of_another_library(options: dict[str, Any], model_folder: Any, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    folder = model_folder("llama")
    arguments = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()).to_dict()}
    found = capture(str(folder), **options, model_args=arguments, out=tmp_path / "t")
    model = loaded(folder, arguments)
    assert type(weight(model)) is not torch.nn.Parameter
    assert found.attributes["model"]["weights"] == weights_digest(model)
    assert capture(reference=found.path, out=tmp_path / "u").nll(0)[:-1] == pytest.approx(
        found.nll(0)[:-1]
    )
