"""What is foretold of a run is what it then does."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import retrace.analyze.replay.engine as replay
from retrace.analyze import Estimate, analyze, estimate
from retrace.traces import Layer, Trace

MakeTrace = Callable[..., Trace]
METHODS = ["exact", "quest:page=4"]


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    """Three layers of different rules, three sequences of which one is long."""
    return make_trace([rules(heads=4), rules(window=9), rules(sinks=(0.5, -1.0))], [53, 1100, 40])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that layers gave, and operations that PyTorch counted in the exact pass."""
    found: Counter[str] = Counter()
    exact_pass = replay.exact_pass

    def watched(block: Any, ranks: int) -> Any:
        # What is counted is dispatched, which tensors of inference mode are not.
        with torch.inference_mode(False), FlopCounterMode(display=False) as counter:
            block.__dict__.update(
                unit=_plain(block.unit),
                queries=block.queries.clone(),
            )
            answer = exact_pass(block, ranks)
        found["operations"] += counter.get_total_flops()
        return answer

    def _plain(unit: Any) -> Any:
        unit.__dict__.update(keys=unit.keys.clone(), values=unit.values.clone())
        return unit

    monkeypatch.setattr(replay, "exact_pass", watched)
    for name in ("query", "key", "value"):
        monkeypatch.setattr(Layer, name, _watched(getattr(Layer, name), found))
    return found


def _watched(read: Callable[..., Any], found: Counter[str]) -> Callable[..., Any]:
    def watched(*given: Any) -> Any:
        tensor = read(*given)
        found["bytes"] += tensor.nbytes
        return tensor

    return watched


def analyzed(trace: Trace, counted: Counter[str], **settings: Any) -> tuple[int, int]:
    """Bytes and operations of the replay itself."""

    def begin(done: int, total: int) -> None:
        if done == 0:
            counted.clear()  # the causality check is over

    analyze(trace, METHODS, [2, 5], workers=1, progress=begin, **settings)
    return counted["bytes"], counted["operations"]


@pytest.mark.parametrize("keep", [False, True])
def test_bytes_and_operations_are_those_of_the_run(
    trace: Trace, counted: Counter[str], keep: bool, tmp_path: Path
) -> None:
    settings = {"keep_exact": keep, "min_context": 10}
    before = estimate(trace, METHODS, [2, 5], workers=1, **settings)
    assert (before.tasks, before.units) == (9, 18)
    assert before.seconds > 0
    assert (before.bytes, before.operations) == analyzed(
        trace, counted, out=tmp_path / "r", **settings
    )
    after = estimate(trace, METHODS, [2, 5], out=tmp_path / "r", **settings)
    assert (after.tasks, after.bytes, after.operations, after.seconds) == (0, 0, 0, 0.0)
    again = estimate(trace, METHODS, [2, 5], **settings)
    assert again.operations == (0 if keep else before.operations)


def test_nothing_is_written(trace: Trace, tmp_path: Path) -> None:
    there = set(tmp_path.rglob("*"))
    half = estimate(trace, ["loki"], [2], out=tmp_path / "r", part=(1, 2), min_context=10)
    assert (half.tasks, half.units) == (3, 6)
    assert set(tmp_path.rglob("*")) == there


def test_methods_that_judge_by_earlier_queries_are_foretold(
    make_trace: MakeTrace, rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the few queries that are tried, some come before each past's end."""
    monkeypatch.setattr("retrace.analyze.replay.forecast.MEASURED", 1 << 21)
    found = estimate(make_trace(rules(), [1100]), ["snapkv", "h2o", "tova", "infllm"], [8])
    assert found.seconds > 0


def test_long_work_is_announced(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Estimate] = []
    settings: dict[str, Any] = {"workers": 1, "keep_exact": False, "announce": said.append}
    short = analyze(trace, METHODS, [4], **settings)
    assert not said
    monkeypatch.setattr("retrace.analyze.commands.analyze.WORTH_PROCESSES", 0)
    out = tmp_path / "r"
    first = analyze(trace, METHODS, [4], out=out, part=(1, 2), **settings)
    rest = estimate(trace, METHODS, [4], out=out, workers=1, keep_exact=False)
    whole = analyze(trace, METHODS, [4], out=out, **settings)
    assert [cost.tasks for cost in said] == [5, 4]
    assert dataclasses.replace(said[1], seconds=rest.seconds) == rest
    assert 0 < said[1].seconds < 60
    assert "forecast" in set(first.profile()["Step"])
    pd.testing.assert_frame_equal(whole.metrics, short.metrics)
