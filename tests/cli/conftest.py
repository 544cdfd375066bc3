"""A tiny trace of random numbers, a tiny random model, and a runner of commands."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from retrace.cli.main import main
from retrace.traces import LayerRules, create_trace

Run = Callable[..., Result]
LAYERS, HEADS, KV_HEADS, CHANNELS = 3, 4, 2, 8
SEQUENCES, POSITIONS = 2, 130


def write_trace(
    path: Path, finished: int | None = None, seed: int = 0, sequences: int = SEQUENCES
) -> None:
    """A trace of which so many sequences are finished, all if not said."""
    generator = np.random.default_rng(seed)
    rules = {
        layer: LayerRules(
            module=f"model.layers.{layer}.self_attn",
            heads=HEADS,
            kv_heads=KV_HEADS,
            key_dim=CHANNELS,
            value_dim=CHANNELS,
            scale=CHANNELS**-0.5,
            window=16 if layer == 2 else None,
        )
        for layer in range(LAYERS)
    }
    writer = create_trace(
        path,
        rules=rules,
        tokens=[np.arange(POSITIONS, dtype=np.int32) + s for s in range(sequences)],
        query_positions=[np.arange(POSITIONS, dtype=np.int32)] * sequences,
        dtype="float32",
        attributes={
            "model": {"pretrained": "tiny", "parameters": 1234},
            "task": [{"task": "text", "source": "tiny.txt", "sequences": sequences}],
            "unrecorded_layers": [3],
        },
    )
    for sequence in range(sequences if finished is None else finished):
        for layer in rules:
            query, key, value = (
                generator.standard_normal((heads, POSITIONS, CHANNELS), np.float32)
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            writer.write_layer(sequence, layer, query, key, value)
        writer.finish_sequence(sequence, generator.random(POSITIONS, np.float32))
    writer.close()


@pytest.fixture(scope="session")
def written_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trace that every test gets a copy of."""
    path = tmp_path_factory.mktemp("written") / "tiny.zarr"
    write_trace(path)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trace(place: Path, written_trace: Path) -> Path:
    """traces/tiny.zarr, in the folder that the test works in."""
    shutil.copytree(written_trace, place / "traces" / "tiny.zarr")
    return Path("traces/tiny.zarr")


@pytest.fixture
def new_trace(place: Path) -> Callable[..., None]:
    """Writes a trace: path, how many sequences are finished, seed, and how many there are."""
    return write_trace


@pytest.fixture
def run() -> Run:
    """Runs `retrace` with these arguments; a traceback is a failure of the test."""

    def run(*arguments: str | Path, code: int = 0, env: dict[str, str] | None = None) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="retrace", env=env)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model, and a tokenizer that knows ten words."""
    import torch
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    words = {f"word{i}": i for i in range(10)} | {"<unk>": 10}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def text(place: Path) -> Path:
    """A text of 400 words, of which each is a token."""
    generator = np.random.default_rng(0)
    path = place / "words.txt"
    path.write_text(" ".join(f"word{i}" for i in generator.integers(0, 10, 400)))
    return path
