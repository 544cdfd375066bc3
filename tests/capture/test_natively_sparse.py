"""What natively sparse models choose is stored and replayed, and told beside what is best."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from transformers import AutoModelForCausalLM

from retrace.analyze import analyze
from retrace.analyze.commands.compare import compare
from retrace.analyze.outputs.markdown import AGAINST_FULL, markdown
from retrace.capture import capture, record
from retrace.traces import RetraceError, Trace, copy_trace, verify_trace

LENGTH, FIRST, BUDGET = 60, 20, 4
FAMILIES = ["deepseek_v32", "hy_v4", "minimax_m3_vl_text", "glm5_next", "qwen4_exp_text"]
"""Choices by ids, shared between layers, of blocks for each kv head, and folded into the mask."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def trace(family: str, model_folder: Any, text_file: Path, tmp_path: Path) -> Trace:
    return capture(
        str(model_folder(family, eos_token_id=None)),
        text=[text_file],
        limit=2,
        max_length=LENGTH,
        generate=4,
        dtype="float32",
        out=tmp_path / "t.zarr",
    )


def by_hand(trace: Trace, index: int, head: int) -> dict[str, float]:
    """Means over the queries of both sequences of what the model's choice comes to, in float64."""
    layer = trace.layer(index)
    rules, found = layer.rules, []
    kv_head = head // rules.group
    for s in trace.sequences:
        queries, keys, values = (
            tensor.astype(np.float64)
            for tensor in (layer.query(s)[head], layer.key(s)[kv_head], layer.value(s)[kv_head])
        )
        for i in range(FIRST, LENGTH):
            scores = queries[i] @ keys[: i + 1].T * rules.scale
            weights = np.exp(scores - scores.max())
            total = weights.sum()
            if rules.sinks is not None:
                total += np.exp(rules.sinks[head] - scores.max())
            chosen = np.arange(i + 1)
            if rules.indexer is not None:
                row = layer.selected(s)[kv_head if rules.indexer.groups > 1 else 0, i]
                chosen = row[row >= 0]
                assert len(set(chosen.tolist())) == len(chosen) <= rules.indexer.kept
            else:
                chosen = np.argsort(-scores, kind="stable")
            best = set(np.argsort(-scores, kind="stable")[:BUDGET].tolist())
            exact = weights @ values[: i + 1] / total
            lost = total - weights.sum()  # to the sink
            own = weights[chosen] @ values[chosen] / (weights[chosen].sum() + lost)
            found.append(
                {
                    "recall": len(best & set(chosen[:BUDGET].tolist())) / BUDGET,
                    "attention_fraction": weights[chosen].sum() / weights.sum(),
                    "density": len(chosen) / (i + 1),
                    "error_norm": np.linalg.norm(exact - own) / np.linalg.norm(exact),
                }
            )
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def test_figures_are_those_of_float64(trace: Trace) -> None:
    assert verify_trace(trace.path).whole and trace.natively_sparse
    results = analyze(trace, ["native"], [BUDGET], min_context=FIRST)
    assert AGAINST_FULL in markdown(results)
    rows = results.metrics.astype({"metric": str}).set_index(["layer", "head", "metric"])["mean"]
    for index in trace.layers:
        for head in range(trace.layer(index).rules.heads):
            for metric, expected in by_hand(trace, index, head).items():
                if metric == "attention_fraction" and trace.layer(index).rules.sinks is not None:
                    continue  # of a denominator with the sink, in results
                found = rows[index, head, metric]
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), (index, head, metric)


def test_in_the_loop_it_is_the_model(trace: Trace, tmp_path: Path) -> None:
    """And full attention is another: what the model's sparsity costs, or gains."""
    options: dict[str, Any] = {"reference": trace.path, "topk": 8}
    own = capture(approximate="native", out=tmp_path / "own.zarr", **options)
    full = capture(approximate="dense", out=tmp_path / "full.zarr", **options)
    drift = compare(trace, [own, full])
    assert own.perplexity() == pytest.approx(trace.perplexity(), rel=1e-5)
    assert abs(np.log(full.perplexity() / trace.perplexity())) > 1e-4
    assert len(drift.runs) == 2


@pytest.mark.parametrize("family", ["deepseek_v32", "minimax_m3_vl_text"], indirect=True)
def test_codes_of_ones_own_are_recorded_alike(
    family: str, trace: Trace, model_folder: Any, tmp_path: Path
) -> None:
    folder = model_folder(family, eos_token_id=None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(trace.tokens(0)).long()[None]
    with record(model, tmp_path / "r.zarr") as recording, torch.inference_mode():
        model.generate(ids[:, : LENGTH - 4], max_new_tokens=5, do_sample=False, pad_token_id=0)
    found = recording.trace
    assert found.tokens(0).tolist() == trace.tokens(0).tolist()
    for index in trace.layers:
        ours, theirs = found.layer(index), trace.layer(index)
        assert ours.rules == theirs.rules
        assert ours.key(0).tobytes() == theirs.key(0).tobytes()
        if theirs.rules.indexer is not None:
            assert (ours.selected(0) == theirs.selected(0)).all()


@pytest.mark.parametrize("family", ["deepseek_v32"], indirect=True)
def test_bytes_are_of_the_latent_cache_and_the_index(trace: Trace) -> None:
    """All heads attend the same keys: each is read once, besides the index of all keys."""
    rules = trace.layer(0).rules
    assert rules.indexer is not None and rules.cached_bytes == (16 + 8) * 2
    assert rules.indexer.bytes_per_key == 16 * 2
    found = analyze(trace, ["native"], [BUDGET], layers=[0], min_context=FIRST).metrics
    ratio = found[found["metric"] == "bytes_ratio"]["mean"].iloc[0]
    positions = np.arange(FIRST, LENGTH) + 1
    expected = (8 * 48 + 32 * positions) / (48 * positions)
    assert ratio == pytest.approx(expected.mean(), rel=1e-6)


def test_a_copy_holds_the_choices_of_the_queries_it_keeps(
    model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    folder = str(model_folder("minimax_m3_vl_text", eos_token_id=None))
    trace = capture(folder, text=[text_file], limit=2, max_length=90, out=tmp_path / "t.zarr")
    copy = copy_trace(trace, tmp_path / "c.zarr", sequences=[1], queries="last:8")
    kept = copy.query_positions(0)
    assert len(kept) == 64 and verify_trace(copy).whole
    assert (copy.layer(1).selected(0) == trace.layer(1).selected(1)[:, kept]).all()


@pytest.mark.parametrize("family", ["deepseek_v32"], indirect=True)
def test_choices_that_cannot_be_are_damage(trace: Trace) -> None:
    array: Any = zarr.open_group(trace.path, mode="r+")["layers/0/selected"]
    array[0, 0, 5, 0] = 6
    damages = verify_trace(trace.path).damages
    assert [(d.array, d.sequence) for d in damages] == [("layers/0/selected", 0)]
    assert "keys that are not there" in damages[0].cause


def test_other_models_choose_nothing(model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    trace = capture(
        str(model_folder("llama")), text=[text_file], limit=1, max_length=40, out=tmp_path / "t"
    )
    assert not trace.natively_sparse
    with pytest.raises(RetraceError, match="attends to all keys"):
        trace.layer(0).selected(0)
    with pytest.raises(RetraceError, match="native is the choice of a natively sparse model"):
        analyze(trace, ["native"], [4], min_context=20)
    assert AGAINST_FULL not in markdown(analyze(trace, ["exact"], [4], min_context=20))
