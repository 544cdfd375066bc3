"""However a model is run, what is recorded is what one pass over each sequence alone gives."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from retrace.capture import capture, evaluate
from retrace.capture.attention.interface import observed_attention
from retrace.capture.checks.runs import check_batch, check_decoded, check_loop, find_decoding
from retrace.capture.checks.trace import examine
from retrace.capture.loop.approximate import Approximator
from retrace.capture.model.likelihood import next_token_nll
from retrace.capture.model.logits import Decoding
from retrace.traces import RetraceError, Trace, to_torch

CheckTrace = Callable[[Trace, Any], None]
TOKENS = np.random.default_rng(0).integers(3, 259, 70).astype(np.int32)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 40,
}
CHANGING: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {
            "sliding_window": None,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 40,
            "rope_parameters": LONGROPE,
        },
    ),
    "longrope of another model": ("llama", {"rope_parameters": LONGROPE}),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 40,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
}
"""Models whose rotary frequencies change past 40 positions."""
ENDLESS = {"eos_token_id": None}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def texts(folder: Path, *lengths: int) -> list[Path]:
    """Files of so many bytes, each of which is a token."""
    files = []
    for number, length in enumerate(lengths):
        files.append(folder / f"{number}.txt")
        files[-1].write_text(("The birds sang a song, and then they slept. " * 9)[number:][:length])
    return files


@pytest.mark.parametrize(
    "model_type", ["bamba", "minimax", "recurrent_gemma", "qwen3_next", "bart", "lfm2"]
)
def test_decoding_is_one_pass(
    model_type: str,
    model_folder: Any,
    text_file: Path,
    tmp_path: Path,
    check_against_one_forward: CheckTrace,
) -> None:
    folder = model_folder(model_type, **ENDLESS)
    trace = capture(
        str(folder),
        text=[text_file],
        limit=1,
        generate=9,
        max_length=39,
        dtype="float32",
        out=tmp_path / "t",
    )
    assert trace.length(0) == 39
    check_against_one_forward(trace, load(folder))


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "minimax"])
def test_runs_do_not_mix(
    model_type: str, model_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"text": [text_file], "limit": 2, "max_length": 30, "generate": 8}
    folder = str(model_folder(model_type, **ENDLESS))
    exact = capture(folder, dtype="float32", out=tmp_path / "exact", **options)
    loop: dict[str, Any] = {"approximate": "exact", "topk": 30}
    again = capture(reference=exact.path, out=tmp_path / "again", **loop)
    for s in again.sequences:
        np.testing.assert_allclose(again.nll(s), exact.nll(s), rtol=0, atol=2e-5)
        kl = again.kl(s)
        assert kl is not None and float(np.nanmax(np.abs(kl))) < 1e-6
        queries = [to_torch(t.layer(t.layers[0]).query(s)) for t in (exact, again)]
        torch.testing.assert_close(*queries, rtol=1e-4, atol=1e-5)
    points = evaluate(exact, ["exact", "window"], [30]).points.set_index("method")
    assert abs(points.loc["exact", "kl"]) < 1e-6
    assert abs(points.loc["exact", "difference"]) < 1e-5


@pytest.mark.parametrize("kind", CHANGING)
def test_a_sequence_is_read_alike_in_any_company(
    kind: str, model_folder: Any, tmp_path: Path
) -> None:
    model_type, changes = CHANGING[kind]
    folder = model_folder(model_type, **changes)
    files = texts(tmp_path, 90, 60, 23, 35, 60)
    traces = [
        capture(
            str(folder),
            text=files,
            max_length=100,
            batch_size=size,
            dtype="float32",
            out=tmp_path / f"{size}",
        )
        for size in (1, 2)
    ]
    for s, file in enumerate(files):
        alone = capture(str(folder), text=[file], max_length=100, out=tmp_path / f"alone {s}")
        for trace in traces:
            for read in ("query", "key"):
                found, expected = (
                    getattr(t.layer(1), read)(i) for t, i in ((trace, s), (alone, 0))
                )
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(trace.nll(s), alone.nll(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CHANGING)
def test_decoding_does_not_cross_the_original_length(
    kind: str, model_folder: Any, tmp_path: Path, check_against_one_forward: CheckTrace
) -> None:
    model_type, changes = CHANGING[kind]
    folder = model_folder(model_type, **changes, **ENDLESS)
    options: dict[str, Any] = {"max_length": 100, "generate": 8, "dtype": "float32"}
    with pytest.raises(RetraceError, match=r"change past 40 positions.* from 35 to 43"):
        capture(str(folder), text=texts(tmp_path, 35), out=tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()
    lengths = (20, 32) if kind == "dynamic" else (32, 50)
    trace = capture(str(folder), text=texts(tmp_path, *lengths), out=tmp_path / "t", **options)
    model = load(folder)
    check_against_one_forward(trace, model)
    for s in trace.sequences:
        prompt = torch.from_numpy(trace.tokens(s)[:-8]).long()[None]
        expected = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert trace.tokens(s).tolist() == expected[0].tolist()


def test_a_method_goes_on_where_a_model_throws_its_cache_away(model_folder: Any) -> None:
    model_type, changes = CHANGING["longrope"]
    model = load(model_folder(model_type, **changes, **ENDLESS))
    prompt = torch.from_numpy(TOKENS[:36]).long()[None]
    generate = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    generate |= {"output_logits": True, "return_dict_in_generate": True}
    layers = examine(model, TOKENS[:36])
    everything = Approximator(_everything(), layers)
    with torch.inference_mode():
        exact = model.generate(prompt, **generate)
        everything.start([0], 36)
        with observed_attention(model, lambda call: None, everything):
            found = model.generate(prompt, **generate)
    assert found.sequences.tolist() == exact.sequences.tolist()
    torch.testing.assert_close(found.logits, exact.logits, rtol=1e-3, atol=1e-3)


def _everything() -> Any:
    from retrace.analyze.methods.specs import parse_spec
    from retrace.analyze.replay.approximation import Approximation

    return Approximation(parse_spec("exact"), 100)


def without_positions(model: Any) -> None:
    """As a model is that cannot be told positions."""
    forward = model.forward
    names = [n for n in inspect.signature(forward).parameters if n != "position_ids"]

    def other(**options: Any) -> Any:
        return forward(**options)

    other.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
    )
    model.forward = other


def test_decoding_that_is_not_one_pass_is_refused(model_folder: Any) -> None:
    model = load(model_folder("bamba"))
    assert find_decoding(model, TOKENS, "float32") == Decoding(positions=True)
    without_positions(model)
    with pytest.raises(RetraceError, match=r"bamba gives other logits when it decodes .* without"):
        find_decoding(model, TOKENS, "float32")
    model = load(model_folder("llama"))
    without_positions(model)
    assert find_decoding(model, TOKENS, "float32") == Decoding(positions=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("model_type", ["mistral", "qwen3_moe", "jamba", "gemma2"])
def test_rounding_is_no_fault(model_type: str, dtype: str, model_folder: Any) -> None:
    model = load(model_folder(model_type), getattr(torch, dtype))
    layers = examine(model, TOKENS)
    decoding = find_decoding(model, TOKENS, dtype)
    check_batch(model, [TOKENS, TOKENS[:23]], dtype)
    check_loop(model, layers, TOKENS, decoding=None)
    check_loop(model, layers, TOKENS, decoding=decoding)
    with torch.inference_mode(), observed_attention(model, lambda call: None):
        batch = torch.from_numpy(TOKENS).long()[None]
        nll = next_token_nll(model, batch, 40, decoding)[0].numpy()
        check_decoded(model, TOKENS, nll, 40, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_batch_that_changes_its_rows_is_refused(dtype: str, model_folder: Any) -> None:
    model_type, changes = CHANGING["longrope"]
    model = load(model_folder(model_type, **changes), getattr(torch, dtype))
    check_batch(model, [TOKENS[:38], TOKENS[:23]], dtype)
    with pytest.raises(RetraceError, match=r"of 23 tokens other logits .* one of 70 "):
        check_batch(model, [TOKENS, TOKENS[:23]], dtype)


def test_likelihoods_of_other_decoding_are_refused(model_folder: Any) -> None:
    model = load(model_folder("bamba"))
    batch = torch.from_numpy(TOKENS).long()[None]
    with torch.inference_mode(), observed_attention(model, lambda call: None):
        wrong = next_token_nll(model, batch, 50, Decoding(positions=False))[0].numpy()
        with pytest.raises(RetraceError, match="bamba gives other likelihoods when it decodes"):
            check_decoded(model, TOKENS, wrong, 50, "float32")


@pytest.mark.parametrize("decodes", [False, True])
def test_a_loop_that_changes_the_model_is_refused(
    decodes: bool, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(model_folder("llama"))
    layers = examine(model, TOKENS)
    decoding = Decoding(positions=True) if decodes else None
    check_loop(model, layers, TOKENS, decoding=decoding)
    answer = Approximator.__call__
    monkeypatch.setattr(Approximator, "__call__", lambda self, call: 1.2 * answer(self, call))
    with pytest.raises(RetraceError, match="llama cannot run with a method in the loop"):
        check_loop(model, layers, TOKENS, decoding=decoding)
