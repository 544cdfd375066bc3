"""docs/costs.md is what its formulas and rates come to, and the formulas are the package's own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.speed import costs
from retrace.analyze.exact.store import KEPT_RANKS, KeptReferences
from retrace.analyze.units.unit import HeadGroup, Unit
from retrace.traces import LayerRules, tensor_bytes

ROOT = Path(__file__).parents[1]


def test_the_page_is_up_to_date() -> None:
    page = costs.page(costs.parse([]))
    assert (ROOT / "docs" / "costs.md").read_text(encoding="utf-8") == page


def test_bytes_are_those_of_traces_and_answers() -> None:
    tokens, model, rules = 1 << 17, costs.SMALL, LayerRules("layer", 32, 8, 128, 128, 1.0)
    for queries in costs.QUERIES:
        kept = costs.Kept(queries).positions
        size = tensor_bytes({0: rules}, [np.zeros(tokens, np.int32)], [kept], "bfloat16")
        assert model.trace_bytes(tokens, len(kept)) == 32 * size
    none = torch.empty(())
    unit = Unit(
        HeadGroup(0, 0, 0, rules),
        none.expand(4, len(kept), 128),
        torch.from_numpy(kept),
        none.expand(tokens, 128),
        none.expand(tokens, 128),
        None,
    )
    answers = KeptReferences.allocate(unit, KEPT_RANKS)
    assert model.answer_bytes(len(kept)) == 32 * sum(a.nbytes for a in vars(answers).values())


def test_shapes_are_those_of_the_models() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for model in costs.MODELS:
        with torch.device("meta"):
            whole = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=model.hidden,
                    intermediate_size=model.intermediate,
                    num_hidden_layers=model.layers,
                    num_attention_heads=model.heads,
                    num_key_value_heads=model.kv_heads,
                    head_dim=model.channels,
                    vocab_size=model.vocabulary,
                )
            )
        matrices = sum(p.numel() for p in whole.parameters() if p.ndim == 2)
        assert model.parameters == matrices


def test_times_that_were_left_out_are_told_apart(tmp_path: Path) -> None:
    table = tmp_path / "long-replay-x.md"
    table.write_text(
        "NVIDIA X, torch 2; one layer\n\n"
        "| positions | queries | MB | step | seconds |\n| ---: | --- | ---: | --- | ---: |\n"
        "| 65,536 | all | 805 | read | 1.50 |\n"
        "| 65,536 | all | 805 | quest | 8.00 |\n"
        "| 131,072 | last:256 | 539 | quest | left out, about 1,200 |\n"
        "| 131,072 | last:256 | 539 | sparq | 3.25 |\n",
        encoding="utf-8",
    )
    replay = costs.Replay.read(table)
    assert replay.layer("last:256", "sparq") == (3.25, True)
    assert replay.layer("last:256", "quest") == (1200.0, False)
    seconds, measured = replay.layer("all", "quest")  # scores: n (n + 1) / 2
    assert not measured and seconds == pytest.approx(8 * 131072 * 131073 / (65536 * 65537))
    assert replay.layer("all", "read") == (3.0, False)
    assert replay.model(costs.LARGE, "last:256", "sparq") == (3.25 * 80 * 64 / 32, False)
