"""How long a sequence a model reads, from what its configuration says of rotary embeddings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from retrace.capture import capture
from retrace.capture.model.lengths import LengthDependence, longest_context
from retrace.traces import RetraceError

YARN = {"rope_type": "yarn", "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


def llama(most: int = 64, **parameters: Any) -> LlamaConfig:
    rope = {"rope_theta": 1e4, **parameters} if parameters else None
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    return LlamaConfig(max_position_embeddings=most, rope_parameters=rope, **sizes)


def phi(original: int | None = 64) -> Phi3Config:
    said = {} if original is None else {"original_max_position_embeddings": original}
    rope = {"rope_theta": 1e4, **LONG}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256}
    return Phi3Config(rope_parameters=rope, pad_token_id=0, **sizes, **said)


class Brought(PreTrainedConfig):
    """As code that a model brings along may have it: by the older name, with the older keys."""

    model_type = "brought"

    def __init__(self, rope_scaling: Any = None, rope_theta: float = 1e4, **options: Any) -> None:
        self.max_position_embeddings = 64
        self.rope_scaling = rope_scaling
        super().__init__(**options)


CASES: dict[str, tuple[Callable[[], Any], int | None]] = {
    "plain": (llama, 64),
    "yarn": (lambda: llama(**YARN, original_max_position_embeddings=64), 256),
    "yarn, with the scaled length": (
        lambda: llama(256, **YARN, original_max_position_embeddings=64),
        256,
    ),
    "yarn, with more": (lambda: llama(512, **YARN, original_max_position_embeddings=64), 512),
    "linear": (lambda: llama(rope_type="linear", factor=4.0), 256),
    "dynamic": (lambda: llama(rope_type="dynamic", factor=2.5), 160),
    "longrope": (phi, 256),
    # Kinds of layers with parameters of their own: what is stated is after scaling.
    "by kind of layer": (
        lambda: Gemma3TextConfig(
            max_position_embeddings=64, rope_scaling={"rope_type": "linear", "factor": 8.0}
        ),
        64,
    ),
    # A table of learned positions ends where it ends, whatever else is stated.
    "learned positions": (
        lambda: GPT2Config(n_positions=64, rope_scaling={"type": "linear", "factor": 4.0}),
        64,
    ),
    "nothing said": (PreTrainedConfig, None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*rope_scaling:FutureWarning")
def test_longest_context(case: str) -> None:
    config, longest = CASES[case]
    assert longest_context(config()) == longest


@pytest.mark.filterwarnings("ignore:.*rope_scaling:FutureWarning")
def test_a_configuration_that_a_model_brings_along() -> None:
    config = Brought(rope_scaling={"type": "linear", "factor": 4.0})
    assert longest_context(config) == 256


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_captured_beyond_the_unscaled_length(
    kind: str, model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    folder = model_folder("llama", max_position_embeddings=32, rope_parameters=rope)
    options: dict[str, Any] = {"text": [text_file], "limit": 1, "out": tmp_path / "t"}
    with pytest.raises(RetraceError, match="reads 64 positions at most"):
        capture(str(folder), max_length=65, **options)
    assert capture(str(folder), max_length=64, **options).length(0) == 64


def test_lengths_with_the_same_frequencies() -> None:
    of = LengthDependence.of
    plain = of(Qwen2Config(max_position_embeddings=64))
    assert plain.frequencies(10) == plain.frequencies(1000)
    assert plain.change(10, 1000) is None
    long = of(phi())
    assert long.frequencies(1) == long.frequencies(64) != long.frequencies(65)
    assert long.frequencies(65) == long.frequencies(256)
    assert [long.change(*span) for span in ((1, 64), (60, 65), (64, 65), (65, 256))] == [
        *(None, 64, 64, None)
    ]
    dynamic = of(llama(rope_type="dynamic", factor=4.0))
    assert dynamic.frequencies(1) == dynamic.frequencies(64) != dynamic.frequencies(65)
    assert dynamic.frequencies(65) != dynamic.frequencies(66)
    assert [dynamic.change(*span) for span in ((1, 64), (60, 65), (80, 81), (80, 80))] == [
        *(None, 64, 80, None)
    ]
