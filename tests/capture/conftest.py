"""Tiny random models of many architectures, saved to folders as a user would have them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.tiny_architectures import ARCHITECTURES
from benchmarks.tiny_models import TEXT, save_tiny_model
from retrace.capture.attention.interface import AttentionCall, observed_attention
from retrace.traces import Trace


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for an `architecture` runs for each."""
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", sorted(ARCHITECTURES))


ModelFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """Makes the folder of a tiny random model of an architecture, once for each request."""
    made: dict[str, Path] = {}

    def make(model_type: str, *, bos: bool = False, **changes: Any) -> Path:
        name = f"{model_type}-{bos}-{sorted(changes.items())}"
        if name not in made:
            folder = tmp_path_factory.mktemp(model_type)
            save_tiny_model(model_type, folder, bos=bos, **changes)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of some 3,000 bytes, of which each is a token."""
    path = tmp_path / "birds.txt"
    path.write_text(TEXT)
    return path


def compare_with_one_forward(trace: Trace, model: Any) -> None:
    """Compare all of a trace with the model reading the same tokens at once."""
    for sequence in trace.sequences:
        tokens = torch.from_numpy(trace.tokens(sequence)).long()
        calls: dict[str, AttentionCall] = {}
        with (
            torch.inference_mode(),
            observed_attention(model, lambda call, calls=calls: calls.update({call.path: call})),
        ):
            logits = model(input_ids=tokens[None], use_cache=False).logits[0].double()
        for index in trace.layers:
            layer = trace.layer(index)
            call = calls[layer.rules.module]
            positions = trace.query_positions(sequence)
            for found, expected in (
                (layer.query(sequence), call.query[0].numpy()[:, positions]),
                (layer.key(sequence), call.key[0].numpy()),
                (layer.value(sequence), call.value[0].numpy()),
            ):
                assert found.shape == expected.shape
                scale = float(np.abs(expected).max())
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * scale)
        nll = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        np.testing.assert_allclose(trace.nll(sequence)[:-1], nll.numpy(), rtol=1e-4, atol=1e-4)
        assert np.isnan(trace.nll(sequence)[-1])


@pytest.fixture
def check_against_one_forward() -> Callable[[Trace, Any], None]:
    """Compares all of a trace with the model reading the same tokens at once."""
    return compare_with_one_forward
