"""A calibration that is saved to a file, and used on another trace of the same model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from retrace.analyze import analyze, calibrate, estimate, merge, recommend
from retrace.analyze.commands.setup import Asked
from retrace.analyze.options import RunOptions, with_defaults
from retrace.analyze.storage.npz import read_arrays, write_arrays
from retrace.cli.main import main
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]


@pytest.fixture
def learnt(make_trace: MakeTrace, rules: Any) -> Trace:
    """What a method learns from."""
    layer = rules(heads=4)
    return make_trace([layer, layer], [60, 50], name="learnt", seed=1)


@pytest.fixture
def other(make_trace: MakeTrace, rules: Any) -> Trace:
    """Another trace of the same model, of a single sequence."""
    layer = rules(heads=4)
    return make_trace([layer, layer], [70], name="other", seed=2)


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """The file with other facts and arrays."""
    arrays: dict[str, Any] = dict(read_arrays(path) or {})
    facts = json.loads(arrays.pop("facts").tobytes())
    change(facts, arrays)
    encoded = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    write_arrays(path, {"facts": encoded, **arrays})
    return path


def figures(trace: Trace, spec: str, path: Path, **options: Any) -> Any:
    return analyze(
        trace, [spec], [3], min_context=0, keep_exact=False, calibration_from=path, **options
    )


@pytest.mark.parametrize("spec", ["loki", "kascade:anchors=1,keys=5,queries=8"])
def test_figures_are_those_of_what_was_learnt(
    learnt: Trace, other: Trace, make_trace: MakeTrace, rules: Any, tmp_path: Path, spec: str
) -> None:
    """As if both traces' sequences were one trace's, and the first two held out."""
    files = calibrate(learnt, spec, out=tmp_path / "learnt.npz")
    assert files == [tmp_path / "learnt.npz"]
    found = figures(other, spec, files[0])
    assert found.run["sequences"] == [0] and found.run["calibration"] is None
    layer = rules(heads=4)
    tensors = {
        (i, n): tuple(t.astype(np.float64) for t in (own.query(s), own.key(s), own.value(s)))
        for n, (trace, s) in enumerate([(learnt, 0), (learnt, 1), (other, 0)])
        for i in (0, 1)
        for own in (trace.layer(i),)
    }
    both = make_trace([layer, layer], [60, 50, 70], tensors=tensors, name="both")
    wanted = analyze(
        both, [spec], [3], min_context=0, calibration_sequences=[0, 1], keep_exact=False
    )
    order = ["layer", "head", "metric", "topk"]
    ours, theirs = (r.metrics.sort_values(order)["mean"].to_numpy() for r in (found, wanted))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_results_say_which_and_change_with_it(learnt: Trace, other: Trace, tmp_path: Path) -> None:
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    calibrate(learnt, "loki", out=first)
    calibrate(learnt, "loki", [0], out=second)
    folder = tmp_path / "results"
    one = figures(other, "loki:rank=2", calibrated(learnt, "loki:rank=2", tmp_path), out=folder)
    told = one.run["methods"]["loki:rank=2"]["calibration"]
    assert len(told) == 32
    runs = [figures(other, "loki", path, out=folder) for path in (first, first, second)]
    digests = [run.run["methods"]["loki"]["calibration"] for run in runs]
    assert digests[0] == digests[1] != digests[2]
    means = [run.metrics[run.metrics.method == "loki"]["mean"].to_numpy() for run in runs]
    np.testing.assert_array_equal(means[0], means[1])
    assert not np.array_equal(means[0], means[2])


def calibrated(trace: Trace, spec: str, folder: Path) -> Path:
    return calibrate(trace, spec, out=folder / "own.npz")[0]


def test_how_keys_are_selected_does_not_matter(learnt: Trace, other: Trace, tmp_path: Path) -> None:
    path = calibrated(learnt, "loki", tmp_path)
    assert figures(other, "loki:pool=sum", path).methods() == ["loki:pool=sum"]


def test_parts_are_merged(learnt: Trace, other: Trace, tmp_path: Path) -> None:
    path, folder = calibrated(learnt, "loki", tmp_path), tmp_path / "parts"
    for part in ((1, 2), (2, 2)):
        figures(other, "loki", path, out=folder, part=part)
    whole = figures(other, "loki", path)
    merged = merge([folder])
    pd.testing.assert_frame_equal(merged.metrics, whole.metrics)
    assert merged.run["methods"]["loki"]["calibration"] is not None


def test_recommendations(learnt: Trace, make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    layer = rules(heads=4)
    trace = make_trace([layer, layer], [70, 60, 65], name="three", seed=3)
    path = calibrated(learnt, "loki", tmp_path)
    found = recommend(trace, "recall=0.01", ["loki"], [20], calibration_from=path, keep_exact=False)
    assert found.facts["calibration"] == [] and found.facts["choose"] == [0, 2]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda facts, _: facts.update(format=2), "format 2"),
        (lambda facts, _: facts.pop("model"), "is no calibration"),
        (lambda facts, _: facts.update(layers=[]), "is no calibration"),
        (lambda facts, _: facts["parameters"].update(rank=3), "does not fit"),
        (lambda facts, _: facts["model"].update(pretrained="else", weights=None), "another model"),
        (lambda facts, _: facts["layers"].pop("1"), "holds nothing of layer 1"),
        (lambda facts, _: facts["layers"]["1"].update(window=9), "another window"),
        (lambda _, arrays: arrays.pop("0.1.components"), "layer 0, kv head 1"),
        (
            lambda _, arrays: arrays.update({"0.1.components": np.zeros((2, 8), np.float32)}),
            "layer 0, kv head 1",
        ),
        (
            lambda _, arrays: arrays.update({"0.1.components": np.zeros((8, 8))}),
            "layer 0, kv head 1",
        ),
        (
            lambda _, arrays: arrays.update(
                {"0.1.components": np.full((8, 8), np.nan, np.float32)}
            ),
            "is no calibration",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    learnt: Trace, other: Trace, tmp_path: Path, change: Any, line: str
) -> None:
    path = changed(calibrated(learnt, "loki", tmp_path), change)
    with pytest.raises(RetraceError, match=line) as refusal:
        figures(other, "loki", path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04.", None])
def test_what_is_none_is_refused(other: Trace, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "none.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RetraceError, match=r"no calibration .*none\.npz|none\.npz is no calib"):
        figures(other, "loki", path)


def test_what_it_does_not_go_with(learnt: Trace, other: Trace, tmp_path: Path) -> None:
    path = calibrated(learnt, "loki", tmp_path)
    for trace, methods, options, line in (
        (learnt, ["loki"], {}, "learnt from sequence 0, 1"),
        (other, ["quest"], {}, "No method here learns"),
        (other, ["loki", "double-sparsity"], {}, "double-sparsity does not fit"),
        (other, ["loki"], {"calibration_sequences": [0]}, "leave one out"),
    ):
        with pytest.raises(RetraceError, match=line):
            analyze(trace, methods, [3], calibration_from=path, keep_exact=False, **options)
    with pytest.raises(RetraceError, match="is for one method"):
        calibrate(learnt, "loki:rank={2,4}", out=path)


def test_of_all_methods_those_that_learnt_something_else_are_left_out(
    learnt: Trace, other: Trace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = calibrated(learnt, "loki", tmp_path)
    asked = Asked.of(other, "all", [3], with_defaults({"calibration_from": path}, RunOptions))
    assert [str(s) for s in asked.specs if s.method.calibrated] == ["loki"]
    assert "Left out: double-sparsity does not fit" in caplog.text


def test_an_estimate_learns_nothing(learnt: Trace, other: Trace, tmp_path: Path) -> None:
    path = calibrated(learnt, "loki", tmp_path)
    cost = estimate(
        other, "loki", [3], calibration_from=path, keep_exact=False, device="cpu", workers=1
    )
    assert cost.tasks == 2


def test_commands(learnt: Trace, other: Trace, tmp_path: Path) -> None:
    path = tmp_path / "loki.npz"
    run = CliRunner().invoke(main, ["calibrate", str(learnt.path), "loki", "--out", str(path)])
    assert run.exit_code == 0 and run.stdout.strip() == str(path)
    arguments = ["--method", "loki", "--topk", "3", "--no-plots", "--out", str(tmp_path / "found")]
    asked = ["analyze", str(other.path), *arguments, "--calibration-from", str(path)]
    run = CliRunner().invoke(main, asked)
    assert run.exit_code == 0, run.output
    assert "no sequence of" in run.stderr and "is held out" in run.stderr
