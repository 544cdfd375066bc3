"""A plan in the loop: the model itself where all is dense, and one method where all have it."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import Plan, analyze, compare
from retrace.analyze.plans.plan import PlannedLayer, Setting
from retrace.capture import capture, evaluate
from retrace.traces import RetraceError, Trace

LENGTH = 50


@pytest.fixture
def folder(model_folder: Any) -> str:
    return str(model_folder("llama", eos_token_id=None))


@pytest.fixture
def exact(folder: str, text_file: Path, tmp_path: Path) -> Trace:
    out = tmp_path / "exact.zarr"
    return capture(folder, text=[text_file], max_length=LENGTH, limit=4, dtype="float32", out=out)


def saved(exact: Trace, file: Path, *settings: Setting) -> str:
    """What stands for a plan that gives kv heads these settings in turns."""
    layers, number = {}, 0
    for index in exact.layers:
        rules = exact.layer(index).rules
        own = [settings[(number + i) % len(settings)] for i in range(rules.kv_heads)]
        number += len(own)
        layers[index] = PlannedLayer(rules.module, tuple(own), rules.group)
    Plan(layers).save(file)
    return f"plan:{file}"


def nll(trace: Trace) -> np.ndarray:
    return np.concatenate([trace.nll(s) for s in trace.sequences])


@pytest.mark.parametrize("options", [{}, {"from_position": 20}])
def test_dense_everywhere_is_the_model(exact: Trace, tmp_path: Path, options: Any) -> None:
    plan = saved(exact, tmp_path / "p.json", Setting("dense"))
    run = capture(reference=exact.path, approximate=plan, **options, out=tmp_path / "run")
    np.testing.assert_array_equal(nll(run), nll(exact))
    [point] = evaluate(exact, plan, [], **options).points.to_dict("records")
    assert abs(point["difference"]) < 1e-7 and abs(point["kl"]) < 1e-9


@pytest.mark.parametrize(
    "method", ["quest:page=4", "snapkv", "loki:rank=4", "tidaldecode:select=0"]
)
@pytest.mark.parametrize("options", [{}, {"from_position": 20}])
def test_one_method_everywhere_is_that_method(
    exact: Trace, tmp_path: Path, method: str, options: Any
) -> None:
    plan = saved(exact, tmp_path / "p.json", Setting(method, 6))
    runs = [
        capture(reference=exact.path, **given, **options, out=tmp_path / f"run-{i}")
        for i, given in enumerate(({"approximate": plan}, {"approximate": method, "topk": 6}))
    ]
    np.testing.assert_array_equal(nll(runs[0]), nll(runs[1]))
    assert np.nanmax(np.abs(nll(runs[0]) - nll(exact))) > 1e-3
    for index in exact.layers:
        for name in ("query", "key", "value"):
            ours, theirs = (getattr(run.layer(index), name)(0) for run in runs)
            np.testing.assert_array_equal(ours, theirs)


def test_each_head_by_its_own(exact: Trace, tmp_path: Path) -> None:
    """In the first layer, whose inputs are the exact model's, the loop's errors are replay's; what
    compare works out afterwards of all layers is what the loop had."""
    settings = (Setting("window", 5), Setting("dense"), Setting("loki:rank=4", fraction=0.1))
    plan = saved(exact, tmp_path / "p.json", *settings)
    run = capture(reference=exact.path, approximate=plan, out=tmp_path / "run")
    told = run.attributes["capture"]["approximation"]
    assert told["method"] == f"plan:{Plan.load(tmp_path / 'p.json').digest}"
    assert Plan.from_json(told["plan"]) == Plan.load(tmp_path / "p.json")
    drift = compare(exact, [run])
    [row] = drift.runs.to_dict("records")
    assert (row["method"], row["code"]) == (told["method"], "same")
    replayed = analyze(exact, plan, min_context=0, keep_exact=False).metrics
    for head in range(exact.layer(0).rules.heads):
        rows = drift.layers
        rows = rows[(rows["tensor"] == "output") & (rows["metric"] == "error")]
        [ours] = rows.loc[(rows["layer"] == 0) & (rows["head"] == head), "mean"]
        at = (replayed["layer"] == 0) & (replayed["head"] == head)
        [theirs] = replayed.loc[at & (replayed["metric"] == "error_norm"), "mean"]
        assert ours == pytest.approx(theirs, abs=1e-5)
    [point] = evaluate(exact, plan, [], out=tmp_path / "e").points.to_dict("records")
    for name in ("perplexity", "difference", "kl"):
        assert point[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6)


def test_decoding(folder: str, text_file: Path, tmp_path: Path) -> None:
    exact = capture(
        folder, text=[text_file], max_length=LENGTH, limit=1, generate=20, out=tmp_path / "e.zarr"
    )
    plan = saved(exact, tmp_path / "p.json", Setting("quest:page=4", 6))
    runs = [
        capture(reference=exact.path, **given, out=tmp_path / f"run-{i}")
        for i, given in enumerate(
            ({"approximate": plan}, {"approximate": "quest:page=4", "topk": 6})
        )
    ]
    np.testing.assert_array_equal(nll(runs[0]), nll(runs[1]))
    mixed = saved(exact, tmp_path / "m.json", Setting("dense"), Setting("snapkv", fraction=0.2))
    run = capture(reference=exact.path, approximate=mixed, out=tmp_path / "mixed")
    differs = np.abs(nll(run) - nll(exact))[:-1] > 1e-6
    assert differs[30:].any() and not differs[:29].any()


def test_refusals(exact: Trace, tmp_path: Path) -> None:
    plan = saved(exact, tmp_path / "p.json", Setting("window", 5))
    with pytest.raises(RetraceError, match="has budgets of its own: leave topk out"):
        capture(reference=exact.path, approximate=plan, topk=5, out=tmp_path / "no")
    layers = dict(Plan.load(tmp_path / "p.json").layers)
    layers.pop(1)
    Plan(layers).save(tmp_path / "q.json")
    with pytest.raises(RetraceError, match="says nothing of layer 1 of"):
        capture(
            reference=exact.path, approximate=f"plan:{tmp_path / 'q.json'}", out=tmp_path / "no"
        )
    capture(
        reference=exact.path,
        approximate=f"plan:{tmp_path / 'q.json'}",
        dense_layers=[1],
        out=tmp_path / "yes",
    )
    with pytest.raises(RetraceError, match="How many keys may a method attend"):
        evaluate(exact, [plan, "window"], [])


def test_the_folder_keeps_a_plans_point(exact: Trace, tmp_path: Path) -> None:
    plan = saved(exact, tmp_path / "p.json", Setting("window", 5), Setting("dense"))
    first = evaluate(exact, [plan, "window"], [3], out=tmp_path / "e")
    assert first.points["topk"].tolist() == [5, 3]
    second = evaluate(exact, [plan, "window"], [3], out=tmp_path / "e")
    pd.testing.assert_frame_equal(first.points, second.points, check_dtype=False)
