"""A method in the loop: exact where it can attend everything, and its own elsewhere."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from retrace.analyze import analyze
from retrace.analyze.commands.compare import compare
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.selection.select import select
from retrace.capture import capture
from retrace.traces import RetraceError, Trace

Capture = Callable[..., Trace]
FAMILIES = ("llama", "mistral", "gemma2", "gpt_oss", "phimoe", "llama4_text", "gpt2", "gpt_neox")
"""Grouped heads, windows, softcaps with windows, sinks with windows, chunks, no rotation."""
LENGTH = 50
AHEAD = """
from retrace.analyze.methods.exact import Exact


class Ahead(Exact):
    def build(self, past):
        past.layer(past.group.layer + 1)
        return past
"""


@pytest.fixture
def captured(model_folder: Any, text_file: Path, tmp_path: Path) -> Capture:
    """Captures a tiny model of a family, by default with exact attention."""

    def run(model_type: str, name: str = "exact", **settings: Any) -> Trace:
        reads = {"text": [text_file], "max_length": LENGTH}
        defaults = {"limit": 2, "dtype": "float32", "out": tmp_path / name}
        reads = {} if "reference" in settings else reads
        folder = str(model_folder(model_type, eos_token_id=None))
        return capture(folder, **{**reads, **defaults, **settings})

    return run


def nll(trace: Trace) -> np.ndarray:
    return np.concatenate([trace.nll(s)[:-1] for s in trace.sequences])


def layer(trace: Trace, index: int, sequence: int = 0) -> list[np.ndarray]:
    read = trace.layer(index)
    return [np.asarray(t(sequence), np.float64) for t in (read.query, read.key, read.value)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_of_everything_changes_nothing(captured: Capture, family: str) -> None:
    exact = captured(family)
    again = captured(
        family, "again", reference=exact.path, approximate="exact", topk=LENGTH, batch_size=2
    )
    np.testing.assert_allclose(nll(again), nll(exact), rtol=0, atol=2e-5)
    assert np.abs(np.concatenate([again.kl(s)[:-1] for s in again.sequences])).max() < 1e-6
    assert exact.kl(0) is None
    few = captured(family, "few", reference=exact.path, approximate="window", topk=2)
    assert np.abs(nll(few) - nll(exact)).max() > 1e-3
    assert all(map(np.array_equal, layer(few, 0), layer(exact, 0)))  # the same inputs
    assert not np.array_equal(layer(few, 1)[0], layer(exact, 1)[0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("spec", ["exact", "quest:page=2", "h2o", "oracle-sample"])
def test_decoding_with_a_method(captured: Capture, family: str, spec: str) -> None:
    exact = captured(family, generate=12, limit=1, max_length=42)
    assert exact.phase(0).sum() == 24  # the code of 12 generated positions
    topk = 200 if spec == "exact" else 3
    found = captured(family, "found", reference=exact.path, approximate=spec, topk=topk)
    assert np.array_equal(found.tokens(0), exact.tokens(0))
    difference = np.abs(found.nll(0) - exact.nll(0))[:-1]
    assert difference[:29].max() < 2e-5  # what is read at once is exact
    assert (difference[30:].max() < 2e-5) == (spec == "exact")


@pytest.mark.parametrize("spec", ["h2o", "snapkv:keep=recent:4", "tova", "rocketkv:window=2"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_is_evicted_is_gone(
    captured: Capture, family: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step, in every layer and head: a key of the prompt that is not attended never is."""
    steps = captured(family, generate=12, limit=1, max_length=42)
    held: dict[tuple[int, int, int], list[set[int]]] = {}
    tried = type(parse_spec(spec).method)

    def recorded(method: Any, served: Any, block: Any, ks: Any) -> Any:
        [selection] = found = select(method, served, block, ks)
        if not isinstance(method, tried):  # of the check that attends everything
            return found
        group = block.unit.group
        attended = selection.attended[0].expand(selection.ids.shape[:2])
        for head, rows in enumerate(zip(selection.ids.tolist(), attended.tolist(), strict=True)):
            for ids, count in zip(*rows, strict=True):
                place = group.layer, group.kv_head, head
                held.setdefault(place, []).append({j for j in ids[:count] if 0 <= j < 30})
        return found

    monkeypatch.setattr("retrace.analyze.replay.approximation.select", recorded)
    topk = 6 if "rocketkv" not in spec else 40  # of what its first stage has left
    captured(family, "d", reference=steps.path, approximate=spec, topk=topk)
    assert held and all(len(each) >= 11 for each in held.values())
    for each in held.values():
        for before, now in itertools.pairwise(each):
            assert now <= before
        assert 0 < len(each[0]) < 30


@pytest.mark.parametrize(
    "spec",
    [
        "quest:page=4",
        "h2o",
        "hnsw:step=4",
        "snapkv:window=3",
        "retroinfer:size=4,recent=8",
        "magicpig:bits=4,window=8",
        "kivi:size=8",
        "think:window=8",
        "quest:cache=fp8,page=4",
        "dense:cache=int4:channel",
        "exact:cache=turboquant:2",
        "h2o:cache=k:int4:channel+v:kivi:2",
        "hnsw:step=4,cache=int4:channel",
        "retroinfer:size=4,recent=8,cache=nvfp4",
    ],
)
def test_decoding_sees_what_reading_at_once_sees(
    captured: Capture, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spec.startswith("hnsw"):
        pytest.importorskip("faiss", reason="faiss is not installed")
    steps = captured("llama", generate=12, limit=1, max_length=42)
    decoded = captured("llama", "d", reference=steps.path, approximate=spec, topk=6)
    # The same tokens as a context, with the method from where they were generated.
    monkeypatch.setattr(Trace, "phase", lambda trace, s: np.zeros(trace.length(s), np.int8))
    at_once = captured(
        "llama", "r", reference=steps.path, approximate=spec, topk=6, from_position=30
    )
    np.testing.assert_allclose(nll(at_once), nll(decoded), rtol=0, atol=2e-5)
    assert np.abs(nll(at_once) - nll(steps))[30:].max() > 1e-4


def test_likelihood_and_divergence_are_those_of_the_model_with_such_a_mask(
    captured: Capture, model_folder: Any
) -> None:
    exact = captured("llama", limit=1)
    found = captured(
        "llama", "found", reference=exact.path, approximate="window:keep=sink:2+recent:1", topk=5
    )
    folder = model_folder("llama", eos_token_id=None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokens = torch.from_numpy(exact.tokens(0)).long()[None]
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    seen = (j <= i) & ((j < 2) | (j > i - 3) | (i < 5))
    hidden = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    with torch.inference_mode():
        p = model(tokens).logits[0].log_softmax(-1)
        q = model(tokens, attention_mask=hidden[None, None]).logits[0].log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)[:-1].numpy()
    assert expected.max() > 1e-3
    np.testing.assert_allclose(found.kl(0)[:-1], expected, rtol=1e-3, atol=1e-6)
    nll = -q[:-1].gather(-1, tokens[0, 1:, None])[:, 0].numpy()
    np.testing.assert_allclose(found.nll(0)[:-1], nll, rtol=1e-5, atol=1e-5)
    assert np.isnan(found.kl(0)[-1])


def attention_by_token(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **asked: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention over keys and values in 4 bits, with a scale and offset for each token."""

    def rounded(vectors: torch.Tensor) -> torch.Tensor:
        low, high = vectors.amin(-1, keepdim=True), vectors.amax(-1, keepdim=True)
        low, step = (x.half().to(vectors.dtype) for x in (low, (high - low) / 15))
        few = low + ((vectors - low) / step).round().clamp(0, 15) * step
        return few.repeat_interleave(query.shape[1] // key.shape[1], dim=1)

    scores = query @ rounded(key).mT * asked["scaling"]
    scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return (scores.softmax(-1) @ rounded(value)).transpose(1, 2), None


def test_a_cache_in_few_bits_is_the_model_on_such_a_cache(
    captured: Capture, model_folder: Any
) -> None:
    AttentionInterface.register("by_token", attention_by_token)
    exact = captured("llama", limit=1)
    settings = {"reference": exact.path, "topk": LENGTH}
    found = captured("llama", "found", approximate="dense:cache=int4:token", **settings)
    folder = model_folder("llama", eos_token_id=None)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="by_token").eval()
    tokens = torch.from_numpy(exact.tokens(0)).long()[None]
    with torch.inference_mode():
        logs = model(tokens).logits[0].log_softmax(-1)
    expected = -logs[:-1].gather(-1, tokens[0, 1:, None])[:, 0].numpy()
    np.testing.assert_allclose(found.nll(0)[:-1], expected, rtol=0, atol=2e-4)
    assert np.abs(nll(found) - nll(exact)).max() > 2e-3
    finer = captured("llama", "finer", approximate="dense:cache=int8:token", **settings)
    assert np.abs(nll(finer) - nll(exact)).max() < np.abs(nll(found) - nll(exact)).max() / 4


def test_positions_and_layers_that_stay_exact(captured: Capture) -> None:
    exact = captured("llama")
    settings = {"reference": exact.path, "approximate": "window", "topk": 2}
    late = captured("llama", "late", from_position=20, **settings)
    assert np.abs(late.nll(0)[:20] - exact.nll(0)[:20]).max() < 1e-6
    assert np.abs(late.nll(0)[20:-1] - exact.nll(0)[20:-1]).max() > 1e-3
    dense = captured("llama", "dense", dense_layers=[0, 1], **settings)
    np.testing.assert_allclose(nll(dense), nll(exact), rtol=0, atol=1e-6)


def test_replay_of_the_first_layer_is_that_of_the_exact_run(captured: Capture) -> None:
    exact = captured("llama")
    found = captured("llama", "found", reference=exact.path, approximate="quest:page=2", topk=4)
    errors = [
        analyze(trace, ["quest:page=2"], [4], keep_exact=False).table()["Mean Error Norm"]
        for trace in (exact, found)
    ]
    assert errors[0][0] == errors[1][0]
    assert errors[0][1] != errors[1][1]


def test_the_trace_tells_what_ran(captured: Capture) -> None:
    exact = captured("llama")
    found = captured(
        "llama", "found", reference=exact.path, approximate="quest:page=2", topk=4, from_position=9
    )
    told = found.attributes["capture"]["approximation"]
    assert told["method"] == "quest:page=2"
    assert (told["topk"], told["from_position"]) == (4, 9)
    assert told["parameters"]["page"] == 2
    assert list(compare(exact, [found]).runs["code"]) == ["same"]
    assert found.attributes["task"] == exact.attributes["task"]
    assert "approximation" not in exact.attributes["capture"]


def test_methods_that_read_other_heads_and_layers(captured: Capture, tmp_path: Path) -> None:
    exact = captured("llama")
    for spec in (
        "tova",
        "quest:page=2,pool=layer-sum",
        "tidaldecode:select=0,correct=1",
        "token-select",
        "retopk",
        "simlayerkv:recent=4,threshold=0.5",
    ):
        found = captured(
            "llama", "found", reference=exact.path, approximate=spec, topk=3, overwrite=True
        )
        assert np.isfinite(nll(found)).all()
    ahead = tmp_path / "ahead.py"
    ahead.write_text(AHEAD)
    with pytest.raises(RetraceError, match="layer 0 needs layer 1, which the model has not come"):
        captured("llama", "a", reference=exact.path, approximate=f"{ahead}:Ahead", topk=3)


def test_calibration_is_from_the_reference(captured: Capture) -> None:
    exact = captured("llama", limit=3)
    found = captured("llama", "found", limit=3, reference=exact.path, approximate="loki", topk=3)
    assert found.attributes["capture"]["approximation"]["calibration"] == [2]
    with pytest.raises(RetraceError, match=r"loki learns from a trace .* --reference"):
        captured("llama", "alone", approximate="loki", topk=3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"approximate": "qest", "topk": 3}, "Did you mean quest"),
        ({"approximate": "quest"}, "How many keys may quest attend"),
        ({"topk": 3}, "topk is for a method"),
        ({"approximate": "quest", "topk": 0}, "topk must be at least 1"),
        ({"approximate": "quest", "topk": 3, "dense_layers": [7]}, "no attention in layer 7"),
        ({"reference": "nowhere"}, "no trace at nowhere"),
    ],
)
def test_mistakes(captured: Capture, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RetraceError, match=words):
        captured("llama", **settings)


WRITERS = """
from dataclasses import dataclass

from retrace.analyze import ScoreMethod


@dataclass(frozen=True, kw_only=True)
class ByKeys(ScoreMethod):
    def scores(self, state, queries, positions):
        return queries @ state.keys.T


class Keys(ByKeys):
    def build(self, past):
        past.keys.div_(past.keys.norm(dim=-1, keepdim=True))
        return past


class Numpy(ByKeys):
    def scores(self, state, queries, positions):
        scores = super().scores(state, queries, positions)
        state.values.numpy()[0] = 9
        return scores


class Late(ByKeys):
    def scores(self, state, queries, positions):
        if len(positions) == 1 and int(positions[0]) == 38:
            state.unit.keys[3] = 0
        return super().scores(state, queries, positions)


class Raises(ByKeys):
    def scores(self, state, queries, positions):
        return [][3]
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "what"), [("Keys", "keys"), ("Numpy", "values")])
def test_a_method_that_writes_is_refused(
    captured: Capture, tmp_path: Path, method: str, what: str, dtype: str
) -> None:
    (tmp_path / "writers.py").write_text(WRITERS)
    exact = captured("llama", dtype=dtype)
    with pytest.raises(
        RetraceError, match=rf"^writers\.py:{method} wrote into the {what} of layer"
    ):
        captured(
            "llama",
            "found",
            reference=exact.path,
            dtype=dtype,
            approximate=f"{tmp_path}/writers.py:{method}",
            topk=3,
        )


def test_a_method_that_writes_while_a_model_decodes_is_refused(
    captured: Capture, tmp_path: Path
) -> None:
    (tmp_path / "writers.py").write_text(WRITERS)
    exact = captured("llama", generate=12, limit=1, max_length=42)
    settings = {"reference": exact.path, "topk": 3}
    with pytest.raises(RetraceError, match=r"^writers\.py:Late wrote into the keys of layer 0"):
        captured("llama", "late", approximate=f"{tmp_path}/writers.py:Late", **settings)
    place = r"layer 0, head 0, sequence 0, position \d+"
    with pytest.raises(
        RetraceError, match=rf"^writers\.py:Raises scores\(\) at {place} raised Ind"
    ):
        captured("llama", "raises", approximate=f"{tmp_path}/writers.py:Raises", **settings)


CHEATS = """
from dataclasses import dataclass

import torch

from retrace.analyze import ScoreMethod


@dataclass(frozen=True, kw_only=True)
class MeanOfAll(ScoreMethod):
    def build(self, past):
        return past.keys * past.keys.mean(dim=0)

    def scores(self, state, queries, positions):
        return queries @ state.T


@dataclass(frozen=True, kw_only=True)
class QueriesOfAll(ScoreMethod):
    def scores(self, state, queries, positions):
        return (queries * state.queries.mean(dim=(0, 1))) @ state.keys.T


@dataclass(frozen=True, kw_only=True)
class Changeable(ScoreMethod):
    def scores(self, state, queries, positions):
        return torch.rand(*queries.shape[:2], state.end)
"""


@pytest.mark.parametrize(
    ("cheat", "words"),
    [
        ("MeanOfAll", "sees the future"),
        ("QueriesOfAll", "sees the future"),
        ("Changeable", "differently when asked twice"),
    ],
)
@pytest.mark.parametrize(
    "settings", [{}, {"from_position": 20}, {"from_position": 48}, {"generate": 6}]
)
def test_a_method_that_sees_what_it_must_not_is_refused(
    captured: Capture, tmp_path: Path, cheat: str, words: str, settings: dict[str, Any]
) -> None:
    """Before anything is captured, also where it would begin at the end of what is tried."""
    (tmp_path / "cheats.py").write_text(CHEATS)
    spec = f"{tmp_path}/cheats.py:{cheat}"
    place = r"layer 0, head 0, sequence 0, position \d+"
    with pytest.raises(RetraceError, match=rf"^cheats\.py:{cheat} .*{place}") as caught:
        captured("llama", "found", approximate=spec, topk=3, max_length=44, **settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "found").exists()


def test_layers_of_each_kind_are_tried(captured: Capture, tmp_path: Path) -> None:
    """Of those that the method is to answer in."""
    text = CHEATS.replace("past.keys.mean(dim=0)", "self.factor(past)") + (
        "\n\n@dataclass(frozen=True, kw_only=True)\nclass InWindows(MeanOfAll):\n"
        "    def factor(self, past):\n        windowed = past.group.rules.window is not None\n"
        "        return past.keys.mean(dim=0) if windowed else 1\n"
    )
    (tmp_path / "cheats.py").write_text(text)
    settings = {"approximate": f"{tmp_path}/cheats.py:InWindows", "topk": 3}
    exact = captured("gemma2")
    windowed = [i for i in exact.layers if exact.layer(i).rules.window is not None]
    assert 0 < len(windowed) < len(exact.layers)
    with pytest.raises(RetraceError, match=f"sees the future.* layer {windowed[0]}"):
        captured("gemma2", "found", **settings)
    captured("gemma2", "found", dense_layers=windowed, **settings)
