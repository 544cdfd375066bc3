"""Whether a model is the one that a trace was captured with: weights by digest, and likelihoods."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from retrace.analyze.commands.compare import compare
from retrace.capture import capture, evaluate
from retrace.capture.recording.identity import CHUNK_WORDS, weights_digest
from retrace.traces import RetraceError, Trace, open_trace


class Holder(nn.Module):
    """A module of the given tensors."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(7, 3, generator=generator),
        "b": torch.randn(7, 3, generator=generator),
        "large": torch.randn(8 * CHUNK_WORDS // 4 + 5, generator=generator),
        "packed": torch.randint(256, (11,), generator=generator, dtype=torch.uint8),
        "rounded": torch.randn(5, generator=generator).bfloat16(),
        "none": torch.zeros(0),
        "one": torch.tensor(True),
    }


def flip(tensor: torch.Tensor, at: int) -> torch.Tensor:
    """With one bit of one byte changed."""
    changed = tensor.clone()
    changed.reshape(-1).view(torch.uint8)[at] ^= 1
    return changed


def test_every_bit_counts() -> None:
    known = weights_digest(Holder(**tensors()))
    assert known == weights_digest(Holder(**tensors())) and len(known) == 32
    others = set()
    for name, tensor in tensors().items():
        size = tensor.nbytes
        for at in {0, size // 2, size - 1} if size else ():
            others.add(weights_digest(Holder(**{**tensors(), name: flip(tensor, at)})))
    assert len(others) == 3 * 5 + 1
    given = tensors()
    for changed in (
        {**given, "a": given["b"], "b": given["a"]},
        {**given, "a": given["a"].T.contiguous()},
        {**given, "a": given["a"].T.reshape(7, 3)},
        {**given, "a": given["a"].view(torch.int32)},
        {**given, "large": given["large"].roll(2)},  # a word further
        {**given, "large": given["large"].roll(2 * CHUNK_WORDS)},
        {**given, "none": torch.zeros(1)},
        {name if name != "a" else "c": tensor for name, tensor in given.items()},
    ):
        others.add(weights_digest(Holder(**changed)))
    assert len(others) == 3 * 5 + 1 + 8 and known not in others


def test_only_what_is_held_counts() -> None:
    known = weights_digest(Holder(**tensors()))
    turned = {name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in tensors().items()}
    turned = {name: t.contiguous().T if t.ndim == 2 else t for name, t in turned.items()}
    assert not turned["a"].is_contiguous() and weights_digest(Holder(**turned)) == known
    # From memory where no word begins.
    shifted = {}
    for name, tensor in tensors().items():
        if tensor.dtype == torch.uint8:
            shifted[name] = torch.cat([torch.zeros(3, dtype=torch.uint8), tensor])[3:]
        else:
            shifted[name] = tensor
    assert weights_digest(Holder(**shifted)) == known
    derived = Holder(**tensors())
    derived.register_buffer("frequencies", torch.ones(3), persistent=False)
    assert weights_digest(derived) == known
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert weights_digest(Holder(**tensors())) == known
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same() -> None:
    model = Holder(**tensors())
    assert weights_digest(model) == weights_digest(model.to("cuda"))


@pytest.fixture
def model(model_folder: Any, tmp_path: Path) -> Path:
    """A model's folder, to be changed."""
    return Path(shutil.copytree(model_folder("llama", eos_token_id=None), tmp_path / "m"))


def train(model: Path) -> None:
    """Change one weight by the least there is."""
    weights = load_file(model / "model.safetensors")
    name = min(weights)
    weights[name] = flip(weights[name], 0)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def replace(model: Path) -> None:
    """Other weights altogether."""
    weights = load_file(model / "model.safetensors")
    weights = {name: tensor.roll(1, 0) for name, tensor in weights.items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def configure(model: Path) -> None:
    """Other arithmetic over the same weights."""
    config = json.loads((model / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (model / "config.json").write_text(json.dumps(config))


def forget(trace: Trace) -> Trace:
    """The trace as an earlier version wrote it, which did not name the weights."""
    file = Path(str(trace.path)) / "zarr.json"
    metadata = json.loads(file.read_text())
    del metadata["attributes"]["model"]["weights"], metadata["attributes"]["tokenizer"]["prefix"]
    metadata.pop("consolidated_metadata", None)
    file.write_text(json.dumps(metadata))
    return open_trace(trace.path)


@pytest.fixture
def exact(model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trace:
    # Each sequence for itself, so that one can be finished and the other not.
    monkeypatch.setattr("retrace.traces.bundles.BUNDLE_POSITIONS", 40)
    out = tmp_path / "exact.zarr"
    return capture(str(model), text=[text_file], max_length=40, limit=2, dtype="float32", out=out)


OTHER = "is not the one that .*exact.zarr was captured with"


@pytest.mark.parametrize(
    ("change", "known", "cause"),
    [
        (train, True, "its weights are others"),
        (replace, False, "its likelihoods are others"),
        (configure, True, "its likelihoods are others"),
    ],
)
def test_a_model_that_has_changed(
    change: Callable[[Path], None], known: bool, cause: str, exact: Trace, model: Path
) -> None:
    exact = exact if known else forget(exact)
    change(model)
    out = model.parent / "run.zarr"
    with pytest.raises(RetraceError, match=f"{OTHER}.*{cause}"):
        evaluate(exact, ["window"], [3])
    for method in ({"approximate": "window", "topk": 3}, {}):
        with pytest.raises(RetraceError, match=f"{OTHER}.*{cause}"):
            capture(reference=exact.path, **method, out=out)
    # Named as another one it may read the same tokens.
    other = model.rename(model.with_name("other"))
    assert len(capture(str(other), reference=exact.path, out=out).sequences) == 2


def test_a_model_that_has_not_changed(exact: Trace, model: Path) -> None:
    moved = model.rename(model.with_name("moved"))
    run = capture(
        str(moved), reference=exact.path, approximate="window", topk=3, out=model.parent / "run"
    )
    assert run.attributes["model"]["weights"] == exact.attributes["model"]["weights"]
    compare(exact, [run])
    moved.rename(model)
    evaluate(forget(exact), ["window"], [3], out=model.parent / "e")


def test_a_folder_of_points_is_of_one_model(exact: Trace, model: Path) -> None:
    out = model.parent / "e"
    evaluate(forget(exact), ["window"], [3], out=out)
    train(model)  # too little for likelihoods to tell
    with pytest.raises(RetraceError, match="points of another weights"):
        evaluate(exact.path, ["window"], [5], out=out)


def test_another_dtype_is_named(exact: Trace, model: Path) -> None:
    with pytest.raises(RetraceError, match=f"{OTHER}.*computes in bfloat16, .*in float32"):
        capture(
            reference=exact.path,
            approximate="window",
            topk=3,
            dtype="bfloat16",
            out=model.parent / "r",
        )
    out = model.parent / "other"
    assert capture(reference=exact.path, dtype="bfloat16", out=out).sequences == (0, 1)


def test_another_release_may_lay_weights_out_otherwise(
    exact: Trace, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model)
    monkeypatch.setattr("retrace.capture.recording.identity.version", lambda package: "9.9.9")
    evaluate(exact, ["window"], [3])
    replace(model)
    with pytest.raises(RetraceError, match="its likelihoods are others"):
        evaluate(exact, ["window"], [3])


@pytest.mark.parametrize("known", [True, False])
def test_an_interrupted_capture(known: bool, exact: Trace, model: Path, text_file: Path) -> None:
    done = Path(str(exact.path)) / "done" / "c" / "1"
    done.unlink()
    exact = exact if known else forget(exact)
    options: dict[str, Any] = {
        "text": [text_file],
        "max_length": 40,
        "limit": 2,
        "dtype": "float32",
        "out": exact.path,
        "resume": True,
    }
    (train if known else replace)(model)
    with pytest.raises(RetraceError, match=OTHER):
        capture(str(model), **options)


def test_going_on_with_an_older_capture(exact: Trace, model: Path, text_file: Path) -> None:
    (Path(str(exact.path)) / "done" / "c" / "1").unlink()
    forget(exact)
    resumed = capture(
        str(model),
        text=[text_file],
        max_length=40,
        limit=2,
        dtype="float32",
        out=exact.path,
        resume=True,
    )
    assert resumed.sequences == (0, 1)


def test_runs_of_two_models_are_not_compared(
    exact: Trace, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = capture(reference=exact.path, approximate="window", topk=3, out=model.parent / "r.zarr")
    file = model.parent / "exact.zarr" / "zarr.json"
    file.write_text(file.read_text().replace(exact.attributes["model"]["weights"], "0" * 32))
    with pytest.raises(RetraceError, match=r"another model than .*exact\.zarr"):
        compare(exact.path, [run])
    assert not caplog.records
    compare(forget(exact), [run])
    assert "do not tell whether their models have the same weights" in caplog.text
