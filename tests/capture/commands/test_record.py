"""What one's own code runs a model on is recorded as a capture of the same tokens would be."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    QuantizedCache,
    StaticCache,
    pipeline,
)

from retrace.analyze import analyze
from retrace.capture import capture, record
from retrace.traces import PHASES, RetraceError, Trace, open_trace, verify_trace

CONTEXT, GENERATED = PHASES["context"], PHASES["generated"]
Ids = torch.Tensor


@pytest.fixture(params=["llama"])
def folder(model_folder: Any, request: pytest.FixtureRequest) -> Path:
    made: Path = model_folder(request.param, eos_token_id=None)
    return made


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    found = AutoTokenizer.from_pretrained(folder, padding_side="left")
    found.pad_token = found.pad_token or found.decode([0])
    return found


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def some_ids(length: int, seed: int = 0) -> Ids:
    return torch.from_numpy(np.random.default_rng(seed).integers(5, 200, (1, length)))


def same(found: Trace, expected: Trace, sequence: int = 0, as_: int = 0, near: float = 0) -> None:
    """One sequence of each is the same, queries, keys and values to `near`, bit for bit if 0."""
    assert found.tokens(sequence).tolist() == expected.tokens(as_).tolist()
    assert found.query_positions(sequence).tolist() == expected.query_positions(as_).tolist()
    assert found.layers == expected.layers
    for index in found.layers:
        assert found.layer(index).rules == expected.layer(index).rules
        for name in ("query", "key", "value"):
            ours = getattr(found.layer(index), name)(sequence)
            theirs = getattr(expected.layer(index), name)(as_)
            if not near:
                assert ours.tobytes() == theirs.tobytes(), (index, name)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=near * np.abs(theirs).max())


def alone(model: Any, tokens: Any, path: Path) -> Trace:
    """The trace of one pass over tokens (positions,)."""
    with record(model, path) as recording:
        model(input_ids=torch.as_tensor(tokens).long()[None], use_cache=False)
    return recording.trace


@pytest.mark.parametrize("folder", ["llama", "gemma3_text", "gpt_oss"], indirect=True)
def test_generate_is_recorded_as_by_capture(
    folder: Path, model: Any, text_file: Path, tmp_path: Path
) -> None:
    """Windows are outgrown on the way."""
    options: dict[str, Any] = {"text": [text_file], "limit": 1, "max_length": 40, "generate": 12}
    expected = capture(str(folder), dtype="float32", out=tmp_path / "c", **options)
    prompt = torch.from_numpy(expected.tokens(0)[:28]).long()[None]
    with record(model, tmp_path / "r") as recording:
        # The last token is not read by `generate`, and was by capture.
        out = model.generate(prompt, max_new_tokens=13, do_sample=False, pad_token_id=0)
    found = recording.trace
    assert out[0, :-1].tolist() == found.tokens(0).tolist()
    same(found, expected)
    assert found.phase(0).tolist() == [CONTEXT] * 28 + [GENERATED] * 12
    assert np.isnan(found.nll(0)[:27]).all()  # `generate` asks for the last logits only
    np.testing.assert_allclose(found.nll(0)[27:-1], expected.nll(0)[27:-1], rtol=1e-4)
    assert verify_trace(found.path).whole


def test_one_pass_has_all_likelihoods(
    folder: Path, model: Any, text_file: Path, tmp_path: Path
) -> None:
    expected = capture(
        str(folder), text=[text_file], limit=1, max_length=40, dtype="float32", out=tmp_path / "c"
    )
    found = alone(model, expected.tokens(0), tmp_path / "r")
    same(found, expected)
    np.testing.assert_allclose(found.nll(0), expected.nll(0), rtol=1e-5)
    assert "likelihoods" not in found.attributes


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("folder", ["llama", "gemma3_text"], indirect=True)
def test_left_padded_batch(
    folder: Path, model: Any, tokenizer: Any, tmp_path: Path, cache: str
) -> None:
    texts = ["The heron stands in the river.", "Birds fly.", "Crows are clever birds, I say."]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    options = {} if cache == "dynamic" else {"cache_implementation": cache}
    with record(model, tmp_path / "r", tokenizer=tokenizer) as recording:
        out = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
    found = recording.trace
    assert found.sequences == (0, 1, 2)
    assert not found.attributes["capture"]["shifted_positions"]
    for s in found.sequences:
        length = int(batch["attention_mask"][s].sum())
        assert found.tokens(s).tolist() == out[s, -length - 8 : -1].tolist()
        expected = alone(model, found.tokens(s), tmp_path / f"{s}")
        same(found, expected, s, near=1e-4)
        known = ~np.isnan(found.nll(s))
        np.testing.assert_allclose(found.nll(s)[known], expected.nll(0)[known], rtol=1e-3)
        assert known.sum() == 7
    assert analyze(found, ["exact"], [4], min_context=8).run["sequences"] == [0, 1, 2]


def test_right_padding_and_a_batch_that_goes_on(model: Any, tmp_path: Path) -> None:
    """What follows right padding has holes before it, which are no positions."""
    ids = torch.cat([some_ids(12, 1), some_ids(12, 2)])
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    more = torch.cat([some_ids(3, 3), some_ids(3, 4)])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    with record(model, tmp_path / "r") as recording:
        model(input_ids=ids, attention_mask=mask, position_ids=places, cache=cache)
        mask = torch.cat([mask, torch.ones_like(more)], dim=1)
        places = (mask.cumsum(1) - 1)[:, -3:]
        model(input_ids=more, attention_mask=mask, position_ids=places, cache=cache)
    found = recording.trace
    assert found.tokens(1).tolist() == [*ids[1, :9].tolist(), *more[1].tolist()]
    for s in found.sequences:
        same(found, alone(model, found.tokens(s), tmp_path / f"{s}"), s, near=1e-4)
        assert found.phase(s).tolist() == [CONTEXT] * found.length(s)


def test_positions_that_are_not_told_leave_no_rotation(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    batch = tokenizer(["The heron stands.", "Birds."], return_tensors="pt", padding=True)
    with record(model, tmp_path / "r") as recording:
        model(**batch)
    found = recording.trace
    assert found.attributes["capture"]["shifted_positions"]
    assert all(found.layer(i).rules.rotation is None for i in found.layers)
    assert verify_trace(found.path).whole


@pytest.mark.parametrize("folder", ["llama", "gemma3_text"], indirect=True)
def test_loop_of_ones_own_with_a_static_cache(model: Any, tmp_path: Path) -> None:
    traces = {}
    for name in ("dynamic", "static"):
        cache: Any = DynamicCache(config=model.config)
        if name == "static":
            cache = StaticCache(config=model.config, max_cache_len=64)
        with record(model, tmp_path / name) as recording:
            token = some_ids(20)
            for _ in range(30):
                logits = model(input_ids=token, cache=cache, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)
        traces[name] = recording.trace
        assert recording.tokens == 20 + 29
    same(traces["static"], traces["dynamic"], near=1e-5)
    assert np.isfinite(traces["static"].nll(0)[:-1]).all()


def test_a_quantised_cache(model: Any, tmp_path: Path) -> None:
    cache = QuantizedCache("fp8", model.config)
    with record(model, tmp_path / "r") as recording:
        token = some_ids(20)
        for _ in range(6):
            logits = model(input_ids=token, cache=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
    found = recording.trace
    assert found.attributes["capture"]["caches"] == ["QuantizedCache"]
    expected = alone(model, found.tokens(0), tmp_path / "a")
    for name in ("key", "value"):
        ours, theirs = (getattr(t.layer(0), name)(0) for t in (found, expected))
        apart = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert 1e-4 < apart < 0.1  # as float8 has them
    assert verify_trace(found.path).whole


def test_a_chat(folder: Path, model: Any, tmp_path: Path) -> None:
    """Turns go on with one cache; the trace is analyzed, and refused as a reference."""
    cache = DynamicCache(config=model.config)
    ids = some_ids(10)
    with record(model, tmp_path / "r", queries="last:4") as recording:
        for turn in range(2):
            ids = torch.cat([ids, some_ids(5, turn)], dim=1)
            ids = model.generate(
                ids, cache=cache, max_new_tokens=4, do_sample=False, pad_token_id=0
            )
    found = recording.trace
    assert found.sequences == (0,)
    assert found.tokens(0).tolist() == ids[0, :-1].tolist()
    c, g = CONTEXT, GENERATED
    # A turn's last token was not read before the next turn is.
    assert found.phase(0).tolist() == [c] * 15 + [g] * 3 + [c] * 6 + [g] * 3
    assert found.query_positions(0).tolist() == [*range(15), *range(23, 27)]
    same_keys = alone(model, found.tokens(0), tmp_path / "a")
    np.testing.assert_allclose(found.layer(1).key(0), same_keys.layer(1).key(0), rtol=0, atol=1e-4)
    with pytest.raises(RetraceError, match="not run again"):
        capture(str(folder), reference=found.path, out=tmp_path / "again")


def test_rows_that_end_are_not_padded(model_folder: Any, model: Any, tmp_path: Path) -> None:
    ids = torch.cat([some_ids(8, 1), some_ids(8, 2)])
    free = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, 8:]
    end = int(free[0, 2])
    assert end not in free[1].tolist()
    model.generation_config.eos_token_id = end
    with record(model, tmp_path / "r") as recording:
        model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    first = free[0].tolist().index(end)
    found = recording.trace
    assert found.tokens(0)[8:].tolist() == free[0, : first + 1].tolist()
    assert found.tokens(1)[8:].tolist() == free[1, :-1].tolist()


def test_a_pipeline_in_a_thread(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with record(model, tmp_path / "r") as recording:
        thread = threading.Thread(target=ask, args=("A heron is a bird.",), kwargs=options)
        thread.start()
        thread.join()
    assert recording.trace.length(0) == len(tokenizer("A heron is a bird.").input_ids) + 3


def test_more_than_fits_into_memory_goes_to_files(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = []
    for capacity in (1 << 30, 1000):
        monkeypatch.setattr("retrace.capture.recording.spool.MEMORY_BYTES", capacity)
        out = tmp_path / str(capacity)
        with record(model, out, queries="stride:3") as recording:
            for seed in range(3):
                ids = some_ids(10 + seed, seed)
                model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
            spools = list(tmp_path.glob(f".{out.name}.recording-*/*"))
            assert bool(spools) == (capacity == 1000)
        traces.append(recording.trace)
    for s in range(3):
        same(traces[1], traces[0], s, s)
    assert [p.name for p in tmp_path.iterdir() if "recording" in p.name] == []


def test_a_pass_that_is_broken_off_leaves_nothing(model: Any, tmp_path: Path) -> None:
    """A batch that does not fit, say, and is tried again in parts; and a cache that went on."""

    def fail(*given: Any) -> None:
        raise MemoryError

    cache = DynamicCache(config=model.config)
    with record(model, tmp_path / "r") as recording:
        model(input_ids=some_ids(9), cache=cache, use_cache=True)
        for options in ({}, {"cache": cache}):
            hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
            with pytest.raises(MemoryError):
                model(input_ids=some_ids(6, 1), **options)
            hook.remove()
        model(input_ids=some_ids(7, 2))
        assert recording.sequences == 2
    found = recording.trace
    assert [found.length(s) for s in found.sequences] == [9, 7]
    same(found, alone(model, found.tokens(0), tmp_path / "a"))
    same(found, alone(model, found.tokens(1), tmp_path / "b"), 1)


def test_the_model_is_as_before_and_an_error_keeps_what_was_recorded(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = model.config._attn_implementation
    hooks = len(model._forward_hooks) + len(model._forward_pre_hooks)
    with pytest.raises(KeyError), record(model, tmp_path / "r"):
        model(input_ids=some_ids(9))
        raise KeyError
    assert model.config._attn_implementation == before
    assert len(model._forward_hooks) + len(model._forward_pre_hooks) == hooks
    kept = open_trace(tmp_path / "r")
    assert kept.sequences == (0,) and "What was recorded" in caplog.text
    with pytest.raises(KeyError), record(model, tmp_path / "r", overwrite=True):
        model(input_ids=some_ids(5))
        raise KeyError
    assert open_trace(tmp_path / "r").length(0) == 9
    with pytest.raises(RetraceError, match="exists"), record(model, tmp_path / "r"):
        pass
    with record(model, tmp_path / "r", overwrite=True, layers=[1]) as recording:
        model(input_ids=some_ids(5))
        with pytest.raises(RetraceError, match="leave its context"):
            recording.trace  # noqa: B018
    assert recording.trace.length(0) == 5 and recording.trace.layers == (1,)


def beams(model: Any) -> None:
    model.generate(some_ids(9), max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)


def foreign_cache(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    key = torch.zeros(1, 2, 4, 16)
    for layer in range(2):
        cache.update(key, key, layer)
    model(input_ids=some_ids(3), cache=cache)


def cropped(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    model(input_ids=some_ids(9), cache=cache, use_cache=True)
    cache.crop(-3)
    model(input_ids=some_ids(2), cache=cache, use_cache=True)


def exchanged(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    ids = torch.cat([some_ids(9, 1), some_ids(9, 2)])
    model(input_ids=ids, cache=cache, use_cache=True)
    cache.reorder_cache(torch.tensor([1, 0]))
    model(input_ids=ids[:, :1], cache=cache, use_cache=True)


def exchanged_beside_a_quantised_one(model: Any) -> None:
    """A cache that rounds its keys makes no other one suspicious of less."""
    model(input_ids=some_ids(9), cache=QuantizedCache("fp8", model.config), use_cache=True)
    exchanged(model)


def packed(model: Any) -> None:
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[5:, :5] = False
    model(input_ids=some_ids(9), attention_mask=mask[None, None])


def embedded(model: Any) -> None:
    model(inputs_embeds=model.get_input_embeddings()(some_ids(9)))


def inner(model: Any) -> None:
    model.model(input_ids=some_ids(9))


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (beams, "beams"),
        (foreign_cache, "not filled under this recording"),
        (cropped, "cropped"),
        (exchanged, "no longer holds"),
        (exchanged_beside_a_quantised_one, "no longer holds"),
        (packed, "other keys in sight"),
        (embedded, "embeddings"),
        (inner, "outside a forward pass"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(
    use: Callable[[Any], None], words: str, model: Any, tmp_path: Path
) -> None:
    with pytest.raises(RetraceError, match=words), record(model, tmp_path / "r"):
        use(model)
    assert model.config._attn_implementation != "retrace_recorder"


def test_models_that_cannot_be_recorded(model: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(RetraceError, match="compiled"),
        record(torch.compile(model, backend="eager"), tmp_path / "r"),
    ):
        pass
    with record(model, tmp_path / "r") as recording:
        model(input_ids=some_ids(4))
        with pytest.raises(RetraceError, match="already"), record(model, tmp_path / "s"):
            pass
    assert recording.trace.length(0) == 4
    with pytest.raises(RetraceError, match="Nothing was recorded"), record(model, tmp_path / "n"):
        pass
    with pytest.raises(RetraceError, match="training"), record(model.train(), tmp_path / "t"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["r"]
