"""A model's prefill with a method of blocks in the loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.analyze.commands.compare import compare
from retrace.capture import capture, evaluate
from retrace.traces import RetraceError, Trace

Capture = Callable[..., Trace]
LENGTH = 50


@pytest.fixture
def captured(model_folder: Any, text_file: Path, tmp_path: Path) -> Capture:
    """Captures a tiny model, by default with exact attention."""

    def run(name: str = "exact", model_type: str = "llama", **settings: Any) -> Trace:
        reads = {"text": [text_file], "max_length": LENGTH}
        defaults = {"limit": 2, "dtype": "float32", "out": tmp_path / name}
        reads = {} if "reference" in settings else reads
        folder = str(model_folder(model_type, eos_token_id=None))
        return capture(folder, **{**reads, **defaults, **settings})

    return run


def nll(trace: Trace) -> np.ndarray[Any, Any]:
    return np.concatenate([trace.nll(s)[:-1] for s in trace.sequences])


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("protocol", ["prefill:8", "prefill:8:chunk=16"])
def test_a_budget_of_everything_changes_nothing(
    captured: Capture, family: str, protocol: str
) -> None:
    exact = captured(model_type=family)
    again, few = (
        captured(name, family, reference=exact.path, approximate=spec, topk=k, protocol=protocol)
        for name, spec, k in (
            ("again", "xattention:block=8,budget=k", LENGTH),
            ("few", "xattention:block=8,stride=4", 8),
        )
    )
    np.testing.assert_allclose(nll(again), nll(exact), rtol=0, atol=2e-5)
    assert np.abs(nll(few) - nll(exact)).max() > 1e-3
    layers = [[np.asarray(few.layer(i).key(0)), np.asarray(exact.layer(i).key(0))] for i in (0, 1)]
    assert np.array_equal(*layers[0]) and not np.array_equal(*layers[1])
    told = few.attributes["capture"]["approximation"]
    assert (told["protocol"], told["method"]) == (protocol, "xattention:block=8,stride=4")


@pytest.mark.parametrize("spec", ["tri-shape:block=8,last=9", "flexprefill:block=8,least=8"])
def test_the_loop_attends_what_replay_does(captured: Capture, spec: str) -> None:
    """Of the first layer, which sees the same: error norms of what it hands on are replay's."""
    exact = captured()
    found = captured(
        "found", reference=exact.path, approximate=spec, topk=16, protocol="prefill:16"
    )
    both = [
        analyze(trace, spec, [16], protocol="prefill:16", layers=[0], keep_exact=False).metrics
        for trace in (exact, found)
    ]
    np.testing.assert_array_equal(both[0]["mean"], both[1]["mean"])
    drift = compare(exact, [found]).layers
    outputs = drift[(drift["layer"] == 0) & (drift["tensor"] == "output")]
    assert (outputs["mean"] > 0).all()
    queries = drift[(drift["layer"] == 0) & (drift["tensor"] == "query")]
    assert (queries["mean"][queries["metric"] == "error"] == 0).all()


def test_a_method_that_learns(captured: Capture) -> None:
    exact = captured(limit=3)
    found = captured(
        "found", reference=exact.path, approximate="minference:block=8,last=8,tried=12", topk=12,
        protocol="prefill:8",
    )  # fmt: skip
    assert np.isfinite(nll(found)).all()
    assert np.abs(found.nll(0) - exact.nll(0))[:-1].max() > 1e-3


def test_what_is_decoded_attends_exactly(captured: Capture) -> None:
    """After a prompt that a method has read, whose keys and values are another's in later layers:
    the first layer's keys of all positions are those of an exact run."""
    exact = captured(generate=6, limit=1, max_length=40)
    found = captured(
        "found", reference=exact.path, approximate="a-shape:block=4", topk=8, protocol="prefill:4"
    )
    assert np.array_equal(found.tokens(0), exact.tokens(0))
    apart = np.abs(found.nll(0) - exact.nll(0))[:-1]
    assert apart[:4].max() < 2e-5 < apart[8:].max()
    everything = captured(
        "all", reference=exact.path, approximate="a-shape:block=4", topk=99, protocol="prefill:4"
    )
    np.testing.assert_allclose(nll(everything), nll(exact), rtol=0, atol=2e-5)


def test_evaluate(captured: Capture, tmp_path: Path) -> None:
    """What a capture costs, and what replay says beside it."""
    exact, spec = captured(), "xattention:block=8,stride=4"
    found = captured("found", reference=exact.path, approximate=spec, topk=16, protocol="prefill:8")
    evaluation = evaluate(exact, spec, [16], protocol="prefill:8", out=tmp_path / "evaluation")
    (point,) = evaluation.points.to_dict("records")
    assert point["difference"] == pytest.approx((nll(found) - nll(exact)).mean(), abs=1e-5)
    replayed = analyze(exact, spec, [16], protocol="prefill:8", keep_exact=False).metrics
    means = replayed.groupby("metric")["mean"].mean()
    for metric in ("compute_ratio", "attention_fraction", "block_recall"):
        assert point[metric] == pytest.approx(means[metric], abs=1e-6)
    with pytest.raises(RetraceError, match="holds points of another protocol"):
        evaluate(exact, spec, [16], protocol="prefill:16", out=tmp_path / "evaluation")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"a-shape chooses keys for whole blocks of queries.*--protocol prefill:B"),
        ({"protocol": "prefill:96"}, r"chooses blocks of 64 keys"),
        ({"protocol": "all"}, r"a method in the loop takes prefill:B, or none"),
        ({"protocol": "prefill:64", "from_position": 9}, r"leave one out"),
        ({"protocol": "prefill:64", "batch_size": 2}, r"batch_size must be 1"),
        ({"protocol": "prefill:64", "approximate": "quest"}, r"quest answers query by query"),
        ({"protocol": "prefill:64", "approximate": None, "topk": None}, r"name it in approximate"),
    ],
)
def test_what_cannot_be_is_refused(
    captured: Capture, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RetraceError, match=message):
        captured("refused", **{"approximate": "a-shape", "topk": 64, **settings})
