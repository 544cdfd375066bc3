"""Adapters of peft: on the model and named where peft is there, refused where it is not."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from retrace.capture import capture
from retrace.traces import RetraceError

with_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="needs `pip install peft`"
)
PLACE = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def base(model_folder: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "base"))


@pytest.fixture
def adapter(base: Path) -> Path:
    """A folder as peft writes it, with an adapter of rank 4 of all queries."""
    folder = base.with_name("adapter")
    folder.mkdir()
    write(folder, base_model_name_or_path=str(base))
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (4, 64), "B": (64, 4)}
    weights = {
        PLACE.format(layer, side): torch.randn(shape, generator=generator)
        for layer in range(2)
        for side, shape in shapes.items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def write(folder: Path, **changes: Any) -> None:
    """The adapter's configuration, with changes."""
    file = folder / "adapter_config.json"
    told = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 64,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    if file.exists():
        told = json.loads(file.read_text())
    file.write_text(json.dumps(told | changes))


def beside(adapter: Path, base: Path) -> Path:
    """A folder of the whole model with the adapter beside its weights."""
    full = base.with_name("full")
    shutil.copytree(base, full)
    shutil.copytree(adapter, full, dirs_exist_ok=True)
    return full


@pytest.mark.parametrize("whole", [True, False], ids=["beside the weights", "alone"])
def test_without_peft(
    whole: bool,
    adapter: Path,
    base: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *of: None if name == "peft" else find(name, *of)
    )
    folder = beside(adapter, base) if whole else adapter
    with pytest.raises(RetraceError, match=r"pip install peft.*merge the adapter") as refusal:
        capture(str(folder), text=[text_file], out=tmp_path / "t")
    assert str(folder) in str(refusal.value)


@with_peft
@pytest.mark.parametrize("device_map", [None, {"model": "disk", "lm_head": "cpu"}])
def test_named_beside_its_model(
    device_map: Any, adapter: Path, base: Path, text_file: Path, tmp_path: Path
) -> None:
    write(adapter, base_model_name_or_path="/another/place")
    options: dict[str, Any] = {"text": [text_file], "limit": 1, "max_length": 40}
    options["device_map"] = device_map
    named = {"peft": str(adapter)}
    found = capture(str(base), **options, model_args=named, out=tmp_path / "t")
    write(adapter, base_model_name_or_path=str(base))
    expected = capture(str(adapter), **options, out=tmp_path / "alone")
    assert found.perplexity() == expected.perplexity()
    told, other = found.attributes["model"], expected.attributes["model"]
    assert (told["weights"], told["adapter"]) == (other["weights"], other["adapter"])
    assert told["arguments"] == named
    for one, message in ((adapter, "name the adapter's model"), (base, "is no peft adapter")):
        with pytest.raises(RetraceError, match=message):
            peft = adapter if one is adapter else base
            capture(str(one), **options, model_args={"peft": str(peft)}, out=tmp_path / "u")


@with_peft
@pytest.mark.parametrize("whole", [True, False], ids=["beside the weights", "alone"])
def test_what_the_merged_model_gives(
    whole: bool, adapter: Path, base: Path, text_file: Path, tmp_path: Path
) -> None:
    folder = beside(adapter, base) if whole else adapter
    options: dict[str, Any] = {"text": [text_file], "limit": 1, "max_length": 40}
    found = capture(str(folder), **options, out=tmp_path / "t")
    merged = AutoModelForCausalLM.from_pretrained(base)
    weights = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for index, layer in enumerate(merged.model.layers):
            down, up = (weights[PLACE.format(index, side)] for side in "AB")
            layer.self_attn.q_proj.weight += 64 / 4 * up @ down
    merged.save_pretrained(base)
    expected = capture(str(base), **options, out=tmp_path / "merged")
    assert found.perplexity() == pytest.approx(expected.perplexity(), rel=1e-5)
    told = found.attributes["model"]["adapter"]
    assert (told["adapter"], told["r"]) == (str(folder), 4)
    assert told["base"] == str(folder if whole else base)
    assert "adapter" not in expected.attributes["model"]
    assert found.attributes["model"]["weights"] != expected.attributes["model"]["weights"]


def rename(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    weights = {name.replace("layers.1", "layers.7"): t for name, t in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def add(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    weights = load_file(file) | {PLACE.format(7, "A"): torch.ones(4, 64)}
    save_file(weights, file, metadata={"format": "pt"})


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    weights = {name: tensor[:, :3].clone() for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


@with_peft
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rename, r"is not for .*base: it lacks model\.layers\.1"),
        (add, "has weights that have no place there, "),
        (cut, "cannot be loaded|of other shapes"),
        (lambda folder: write(folder, base_model_name_or_path=None), "names no model"),
        (lambda folder: write(folder, base_model_name_or_path="/no/where"), "There is no model"),
        (lambda folder: write(folder, target_modules=["nothing"]), "holds no peft adapter"),
        (lambda folder: write(folder, peft_type="NOSUCH"), "holds no peft adapter"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "No such file"),
    ],
)
def test_adapters_that_cannot_be_put_on(
    spoil: Callable[[Path], Any], message: str, adapter: Path, text_file: Path, tmp_path: Path
) -> None:
    spoil(adapter)
    with pytest.raises(RetraceError, match=message) as refusal:
        capture(str(adapter), text=[text_file], limit=1, out=tmp_path / "t")
    assert "\n" not in str(refusal.value)
