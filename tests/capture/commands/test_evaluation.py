"""Methods in the loop, point by point, beside replay."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrace.analyze import analyze
from retrace.analyze.commands.compare import compare
from retrace.capture import capture, evaluate
from retrace.capture.tables.evaluation import Evaluation
from retrace.capture.tables.plot import draw_evaluation
from retrace.traces import RetraceError, Trace
from retrace.traces.storage.lock import locked_folder

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


def test_caches_in_few_bits(exact: Trace, folder: str, tmp_path: Path) -> None:
    specs = [f"dense:cache={cache}" for cache in ("int8:token", "int4:token")]
    found = evaluate(exact, specs, [LENGTH])
    finer, few = (point(found, spec, LENGTH) for spec in specs)
    run = capture(
        folder, reference=exact.path, approximate=specs[1], topk=LENGTH, out=tmp_path / "run.zarr"
    )
    [told] = compare(exact, [run]).runs.to_dict("records")
    assert few["kl"] == pytest.approx(told["kl"], rel=1e-4)
    assert 0 < finer["kl"] < few["kl"] / 10


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
    monkeypatch.setattr("retrace.capture.commands.evaluate.open_checkpoint", None)
    again = evaluate(exact, ["window"], [3, 5], out=out)
    assert point(again, "window", 3) == point(first, "window", 3)
    assert again.points["topk"].tolist() == [3, 5]
    pd.testing.assert_frame_equal(Evaluation.load(out).points, again.points)
    [file] = draw_evaluation(again, tmp_path)
    assert file.stat().st_size > 10_000
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


def test_points_of_other_code_are_run_again(
    exact: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "e"
    first = evaluate(exact, ["window", "random"], [4], out=out)
    replace(first, points=first.points.assign(perplexity=0.0)).save(out)
    kept = evaluate(exact, ["window"], [4], out=out)
    assert point(kept, "window", 4)["perplexity"] == 0
    monkeypatch.setattr("retrace.capture.commands.evaluate.code_digest", lambda *_: "0" * 64)
    found = evaluate(exact, ["window"], [4], out=out)
    assert point(found, "window", 4)["perplexity"] == point(first, "window", 4)["perplexity"]
    assert point(found, "random", 4)["perplexity"] == 0
    assert found.facts["outdated"] == ["random"]
    assert "figures of other code than there is now: random." in caplog.text
    again = evaluate(exact, ["random"], [8], out=out, again=True)
    assert point(again, "random", 4)["perplexity"] == point(first, "random", 4)["perplexity"]
    assert again.has("random", 8)
    assert again.has("window", 4)


@pytest.mark.parametrize("name", ["evaluation.json", "evaluation.parquet"])
@pytest.mark.parametrize("content", ["pipe", "[]", '{"methods": {"window": 3}}', "[" * 9999, ""])
def test_files_of_others(exact: Trace, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "e").mkdir()
    table = pd.DataFrame({"method": ["window"], "topk": [4]})
    table.to_parquet(tmp_path / "e" / "evaluation.parquet")
    (tmp_path / "e" / "evaluation.json").write_text("{}")
    (tmp_path / "e" / name).unlink()
    if content == "pipe":
        os.mkfifo(tmp_path / "e" / name)
    else:
        (tmp_path / "e" / name).write_text(content)
    with pytest.raises(RetraceError, match="e holds no evaluation of retrace"):
        evaluate(exact, ["window"], [4], out=tmp_path / "e")


def test_a_table_that_unpacks_to_anything(exact: Trace, tmp_path: Path, bounded: None) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "evaluation.json").write_text("{}")
    schema = pa.schema([("method", pa.string()), ("topk", pa.int64())])
    part = pa.table([["x" * 5000] * 4096, [4] * 4096], schema=schema)
    with pq.ParquetWriter(tmp_path / "e" / "evaluation.parquet", schema) as writer:
        for _ in range(256):
            writer.write_table(part)
    with pytest.raises(RetraceError, match="larger than such a file can hold"):
        evaluate(exact, ["window"], [4], out=tmp_path / "e")


def test_one_evaluation_at_a_time(exact: Trace, tmp_path: Path) -> None:
    out = tmp_path / "e"
    with locked_folder(out), pytest.raises(RetraceError, match="Another run is writing"):
        evaluate(exact, ["window"], [4], out=out)
    (out).mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(RetraceError, match="no evaluation of retrace: choose another"):
        evaluate(exact, ["window"], [4], out=out, overwrite=True)
