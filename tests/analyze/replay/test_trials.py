"""What cannot run on a trace is told before any work: by name, and left out of `all`."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze, estimate
from retrace.analyze.methods import registry, specs
from retrace.traces import RetraceError, Trace, create_trace, open_trace


@pytest.fixture(autouse=True)
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """`all` is as many as the tests are about."""
    few = ["quest", "loki", "tidaldecode", "lessismore", "kascade"]
    for module in (registry, specs):
        monkeypatch.setattr(module, "method_names", lambda: few)


@pytest.fixture
def some_layers(tmp_path: Path, rules: Any, tensors: Any) -> Trace:
    """A trace of layers 0, 5 and 12 alone, with two sequences."""
    layers = {i: replace(rules(), module=f"layers.{i}") for i in (0, 5, 12)}
    writer = create_trace(
        tmp_path / "some.zarr",
        rules=layers,
        tokens=[np.zeros(48, np.int32)] * 2,
        query_positions=[np.arange(48, dtype=np.int32)] * 2,
        dtype="float32",
        attributes={"model": "random", "task": "none"},
    )
    rng = np.random.default_rng(0)
    for sequence in range(2):
        for i, layer in layers.items():
            given = [t.astype(np.float32) for t in tensors(layer, 48, rng)]
            writer.write_layer(sequence, i, *given)
        writer.finish_sequence(sequence, np.zeros(48, np.float32))
    writer.close()
    return open_trace(writer.path)


def test_all_of_one_sequence(
    make_trace: Callable[..., Trace], rules: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trace = make_trace([rules(), rules(), rules()], [48])
    with caplog.at_level(logging.WARNING, "retrace"):
        results = analyze(trace, ["all"], [2], keep_exact=False)
    assert set(results.methods()) == {"quest", "tidaldecode", "lessismore"}
    left_out = [r.getMessage() for r in caplog.records if "Left out" in r.getMessage()]
    assert [line.split()[2] for line in left_out] == ["loki", "kascade"]
    assert all("has only 1 finished" in line for line in left_out)
    assert estimate(trace, ["all"], [2], keep_exact=False).tasks == 3
    with pytest.raises(RetraceError, match=r"^loki learns from sequences .* has only 1 finished"):
        analyze(trace, ["quest", "loki"], [2], keep_exact=False)


def test_all_of_some_layers(some_layers: Trace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "retrace"):
        results = analyze(some_layers, ["all"], [2], keep_exact=False)
    assert set(results.methods()) == {"quest", "loki", "kascade"}
    left_out = [r.getMessage() for r in caplog.records if "Left out" in r.getMessage()]
    assert [line.split()[2] for line in left_out] == ["tidaldecode", "lessismore"]
    assert all("in layer 5 needs layer 2, which the trace does not hold" in x for x in left_out)


def test_a_named_method_is_refused_before_any_work(some_layers: Trace) -> None:
    done = []
    with pytest.raises(RetraceError, match=r"^tidaldecode in layer 5 needs layer 2, which"):
        analyze(
            some_layers,
            ["quest", "tidaldecode"],
            [2],
            keep_exact=False,
            progress=lambda *at: done.append(at),
        )
    assert not done
    rows = analyze(some_layers, ["tidaldecode:select=0,correct=5"], [2], keep_exact=False).metrics
    assert set(rows["layer"]) == {0, 5, 12}


def test_layers_that_are_not_replayed_do_not_matter(some_layers: Trace) -> None:
    rows = analyze(some_layers, ["tidaldecode"], [2], layers=[0], keep_exact=False).metrics
    assert set(rows["layer"]) == {0}


def test_one_that_reads_other_layers_unasked_is_tried_in_all(
    some_layers: Trace, write_methods: Any
) -> None:
    body = """
    @dataclass(frozen=True, kw_only=True)
    class Below(ScoreMethod):
        def build(self, past):
            return past.layer({0: 0, 5: 0, 12: 4}[past.group.layer])[past.group.kv_head]

        def scores(self, state, queries, positions):
            return queries @ state.keys.T
    """
    done = []
    with pytest.raises(RetraceError, match=r"^mine\.py:Below in layer 12"):
        analyze(
            some_layers,
            [f"{write_methods(body)}:Below"],
            [2],
            keep_exact=False,
            progress=lambda *at: done.append(at),
        )
    assert not done
