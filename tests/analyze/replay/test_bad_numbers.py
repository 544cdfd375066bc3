"""Numbers that no attention can be computed from are refused before any method runs, by name."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze, calibrate
from retrace.analyze.commands.export import export
from retrace.traces import DamageError, LayerRules, RetraceError, Trace, verify_trace

MakeTrace = Callable[..., Trace]
NAMES = ("query", "key", "value")
BAD = {"NaN": np.nan, "inf": np.inf, "-inf": -np.inf, "overflow": 3e20}


@pytest.fixture
def spoilt(make_trace: MakeTrace, rules: Any, tensors: Any) -> Callable[..., Trace]:
    """A function that makes a trace of two layers with a bad number in layer 1 of sequence 1."""

    def make(name: str, number: float) -> Trace:
        layer = rules(heads=4, kv_heads=2)
        given = [array.copy() for array in tensors(layer, 40, np.random.default_rng(0))]
        head = 3 if name == "query" else 1
        given[NAMES.index(name)][head, 17, 2] = number
        given[NAMES.index(name)][head, 30, 0] = number
        return make_trace([layer, layer], [50, 40], tensors={(1, 1): tuple(given)}, name="own")

    return make


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", BAD)
def test_the_first_is_named(spoilt: Callable[..., Trace], name: str, bad: str) -> None:
    trace = spoilt(name, BAD[bad])
    what = "numbers as large as 3e" if bad == "overflow" else f"it holds {BAD[bad]!s}".lower()
    head = "head 3" if name == "query" else "kv head 1"
    # Methods that read other layers or learn of sequences are not to blame.
    for method in ("quest", "tidaldecode:select=1", "exact"):
        with pytest.raises(DamageError) as caught:
            analyze(trace, [method], [2], workers=1, keep_exact=False)
        said = str(caught.value)
        assert f"{name} of layer 1, sequence 1 is damaged" in said
        assert what in said.lower() and f"at {head}, position 17)" in said
        assert not said.startswith(method)
    assert [d.sequence for d in verify_trace(trace).damages] == [1]


def test_also_where_methods_learn_or_vectors_are_exported(
    spoilt: Callable[..., Trace], tmp_path: Path
) -> None:
    trace = spoilt("key", np.nan)
    for call in (
        lambda: calibrate(trace, "loki", [1]),
        lambda: analyze(trace, ["loki"], [2], calibration_sequences=[1], workers=1),
        lambda: analyze(trace, ["all"], [2], calibration_sequences=[1], workers=1),
        lambda: export(trace, tmp_path / "out", "numpy"),
    ):
        with pytest.raises(DamageError, match="it holds NaN at kv head 1, position 17"):
            call()


def test_damaged_sequences_are_left_out(
    spoilt: Callable[..., Trace], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    results = analyze(spoilt("value", 3e20), topk=[2], skip_damaged=True, workers=1)
    assert set(results.sequences["sequence"]) == {0}
    assert "Sequence 1 is left out" in caplog.text


def test_scores_that_overflow(make_trace: MakeTrace, rules: Any, tensors: Any) -> None:
    layer = rules(scale=1e10)
    query, key, value = tensors(layer, 40, np.random.default_rng(0))
    query[1, 20:] *= 1e16
    key[:, 10] *= 1e16
    trace = make_trace(layer, [40], tensors={(0, 0): (query, key, value)}, name="own")
    with pytest.raises(DamageError, match="overflow float32 at head 1, position 20"):
        analyze(trace, ["quest"], [2], workers=1)
    assert verify_trace(trace).damages[0].tensor == "query"


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 0.0},
        {"scale": np.nan},
        {"scale": 1e-60},
        {"scale": 1e60},
        {"softcap": 0.0},
        {"softcap": -1.0},
        {"softcap": np.inf},
        {"sinks": (0.0, np.nan)},
    ],
    ids=str,
)
def test_rules_of_which_no_score_can_come(change: dict[str, Any]) -> None:
    with pytest.raises(RetraceError, match=f"layer: {next(iter(change))} must be"):
        LayerRules("layer", 2, 2, 8, 8, **{"scale": 1.0, **change})
