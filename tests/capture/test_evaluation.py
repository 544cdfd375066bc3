"""Methods in the loop, point by point, beside replay."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import analyze
from retrace.analyze.compare import compare
from retrace.capture import capture, evaluate
from retrace.capture.evaluation import Evaluation
from retrace.capture.evaluation_plot import draw_evaluation
from retrace.traces import RetraceError, Trace

LENGTH = 50


@pytest.fixture
def folder(model_folder: Any) -> str:
    return str(model_folder("llama", eos_token_id=None))


@pytest.fixture
def exact(folder: str, text_file: Path, tmp_path: Path) -> Trace:
    out = tmp_path / "exact.zarr"
    return capture(folder, text=[text_file], max_length=LENGTH, limit=3, dtype="float32", out=out)


def point(evaluation: Evaluation, method: str, topk: int) -> dict[str, Any]:
    rows = evaluation.points
    [row] = rows[(rows["method"] == method) & (rows["topk"] == topk)].to_dict("records")
    return row


def test_a_point_is_what_a_captured_run_comes_to(exact: Trace, folder: str, tmp_path: Path) -> None:
    found = evaluate(exact, ["exact", "quest:page=2"], [4, LENGTH])
    everything = point(found, "exact", LENGTH)
    assert abs(everything["difference"]) < 2e-5
    assert abs(everything["kl"]) < 1e-6
    assert everything["exact_perplexity"] == pytest.approx(exact.perplexity(), rel=1e-6)
    few = point(found, "quest:page=2", 4)
    run = capture(
        folder,
        reference=exact.path,
        approximate="quest:page=2",
        topk=4,
        out=tmp_path / "run.zarr",
    )
    [told] = compare(exact, [run]).runs.to_dict("records")
    assert told["kl"] > 1e-3
    for name in ("perplexity", "exact_perplexity", "difference", "low", "high", "kl"):
        assert few[name] == pytest.approx(told[name], rel=1e-4, abs=1e-6), name
    replayed = analyze(exact, ["quest:page=2"], [4], min_context=0).metrics
    for name in ("recall", "error_norm", "attention_fraction", "density", "bytes_ratio"):
        mean = replayed.loc[replayed["metric"] == name, "mean"].mean()
        assert few[name] == pytest.approx(mean, rel=1e-6), name


def test_what_the_exact_model_reads_is_not_counted(
    exact: Trace, folder: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"from_position": 20}
    found = point(evaluate(exact, ["window"], [2], **options, out=tmp_path / "e"), "window", 2)
    run = capture(
        folder, reference=exact.path, approximate="window", topk=2, **options, out=tmp_path / "run"
    )
    after, before = (
        np.concatenate([t.nll(s).astype(float) for s in exact.sequences]).reshape(3, LENGTH)
        for t in (run, exact)
    )
    np.testing.assert_allclose(after[:, :20], before[:, :20], atol=1e-5)  # which the model read
    expected = (after - before)[:, 20:-1].mean()
    assert abs(expected) > 1e-3
    assert found["difference"] == pytest.approx(expected, abs=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(after[:, 20:-1].mean()), rel=1e-6)
    [told] = compare(exact, [run]).runs.to_dict("records")
    for name in ("perplexity", "exact_perplexity", "difference", "low", "high", "kl"):
        assert found[name] == pytest.approx(told[name], rel=1e-4, abs=1e-6), name
    # Points of a folder that was written when the exact positions were counted too.
    facts = tmp_path / "e" / "evaluation.json"
    old = {k: v for k, v in json.loads(facts.read_text()).items() if k != "counted_from"}
    facts.write_text(json.dumps(old))
    with pytest.raises(RetraceError, match="holds points of another counted_from"):
        evaluate(exact, ["window"], [3], **options, out=tmp_path / "e")
    with pytest.raises(RetraceError, match=r"predict nothing.*has 50 tokens"):
        evaluate(exact, ["window"], [3], from_position=LENGTH - 1)


def test_points_that_are_there_are_not_run_again(
    exact: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "points", []
    first = evaluate(exact, ["window"], [3], out=out)
    evaluate(exact, ["window"], [3, 5], out=out, progress=lambda *told: seen.append(told))
    assert ("Evaluating", 3, 3) in seen  # one point of three sequences
    assert not any(what == "Evaluating" and total > 3 for what, _, total in seen)
    monkeypatch.setattr("retrace.capture.evaluation.open_checkpoint", None)
    again = evaluate(exact, ["window"], [3, 5], out=out)
    assert point(again, "window", 3) == point(first, "window", 3)
    assert again.points["topk"].tolist() == [3, 5]
    pd.testing.assert_frame_equal(Evaluation.load(out).points, again.points)
    assert draw_evaluation(again, tmp_path).stat().st_size > 10_000
    with pytest.raises(RetraceError, match="holds points of another from_position"):
        evaluate(exact, ["window"], [3], out=out, from_position=9)


def test_methods_that_learn_leave_their_sequences_out(exact: Trace) -> None:
    found = evaluate(exact, ["loki", "window"], [4])
    alone = evaluate(exact, ["window"], [4])
    assert found.facts["calibration"] == [2]
    assert point(found, "window", 4)["difference"] != point(alone, "window", 4)["difference"]
    assert np.isfinite(point(found, "loki", 4)["perplexity"])


def test_decoding(folder: str, text_file: Path, tmp_path: Path) -> None:
    decoded = capture(
        folder,
        text=[text_file],
        limit=1,
        max_length=42,
        generate=12,
        dtype="float32",
        out=tmp_path / "decoded.zarr",
    )
    found = evaluate(decoded, ["h2o"], [5, 8])
    assert found.facts["from_position"] == 30
    # The exact model's run over a sequence is remembered from one point to the next.
    both = [point(several, "h2o", 8) for several in (found, evaluate(decoded, ["h2o"], [8]))]
    for name in ("perplexity", "difference", "kl"):
        assert both[0][name] == both[1][name] != 0, name
    run = capture(
        folder, reference=decoded.path, approximate="h2o", topk=5, out=tmp_path / "run.zarr"
    )
    difference = np.nanmean(run.nll(0)[30:].astype(float) - decoded.nll(0)[30:].astype(float))
    assert point(found, "h2o", 5)["difference"] == pytest.approx(difference, abs=1e-6)
    replayed = analyze(decoded, ["h2o"], [5], protocol="prefix:30", min_context=30).metrics
    errors = replayed.loc[replayed["metric"] == "error_norm", "mean"]
    assert point(found, "h2o", 5)["error_norm"] == pytest.approx(errors.mean(), rel=1e-6)


def test_mistakes(exact: Trace, folder: str, tmp_path: Path) -> None:
    run = capture(
        folder, reference=exact.path, approximate="window", topk=4, out=tmp_path / "run.zarr"
    )
    with pytest.raises(RetraceError, match="is not the exact run"):
        evaluate(run, ["window"], [4])
    with pytest.raises(RetraceError, match="Did you mean quest"):
        evaluate(exact, ["qest"], [4])
    with pytest.raises(RetraceError, match="no attention in layer 9"):
        evaluate(exact, ["window"], [4], dense_layers=[9])
