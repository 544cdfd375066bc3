"""`retrace analyze`: what it prints where, and what it leaves in the folder."""

import csv
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from click.testing import Result

from retrace.analyze import Results, analyze
from retrace.traces import RetraceError

Run = Callable[..., Result]
HEADER = "| Layer | Mean Recall | Std Recall | Mean Error Norm | Std Error Norm |"


def test_tables_on_stdout_and_words_on_stderr(run: Run, trace: Path) -> None:
    methods = ("--method", "exact", "--method", "quest")
    result = run("analyze", trace, *methods, "--topk", "5,10", "--no-plots")
    titles = [line for line in result.stdout.splitlines() if line.startswith("###")]
    assert titles == [
        "### exact, top-k 5",
        "### exact, top-k 10",
        "### quest, top-k 5",
        "### quest, top-k 10",
        "### Means over layers and heads (in brackets 95 % intervals over 2 sequences; bytes of a "
        "cache in bfloat16)",
    ]
    assert "| quest, 10 | " in result.stdout
    assert result.stdout.count(HEADER) == 4
    assert result.stdout.count("| model.layers.1.self_attn | ") == 4
    assert "results/tiny" in result.stderr
    assert "traces/tiny.exact (" in result.stderr
    assert "Replaying" not in result.stderr  # no progress bar where there is no terminal


def test_the_folder(run: Run, trace: Path) -> None:
    run("analyze", trace, "--topk", "5", "--out", "here", "--no-plots")
    files = {file.name for file in Path("here").iterdir()}
    assert files == {
        "metrics.parquet",
        "curves.parquet",
        "sequences.parquet",
        "positions.parquet",
        "head_patterns.parquet",
        "locality.parquet",
        "tails.parquet",
        "projected.parquet",
        "run.json",
        "table.md",
    }
    run("analyze", trace, "--topk", "5", "--out", "here")
    assert {file.name for file in Path("here/plots").iterdir()} == {
        "attention-fraction-curves.png",
        "attention-fraction-curves-by-layer.png",
        "attention-fraction-heatmap-exact-k5.png",
        "by-distance.png",
        "by-position.png",
        "error-by-bytes.png",
        "error-norm-by-layer.png",
        "recall-by-layer.png",
        "tails-by-layer.png",
        "top1-hit-by-layer.png",
    }


def test_figures_are_those_of_the_python_call(run: Run, trace: Path) -> None:
    result = run("analyze", trace, "--method", "quest", "--topk", "5", "--no-plots")
    table = analyze(trace, ["quest"], [5]).table("quest", 5)
    for row in table.itertuples(index=False):
        figures = " | ".join(f"{figure:.4f}" for figure in row[3:])
        assert f"| {row.Layer} | {figures} |" in result.stdout


def test_json_is_all_there_is_on_stdout(run: Run, trace: Path) -> None:
    result = run("analyze", trace, "--topk", "2,12", "--format", "json", "--layers", "0,2")
    rows = json.loads(result.stdout)
    assert {row["layer"] for row in rows} == {0, 2}
    assert {row["topk"] for row in rows} == {2, 12}
    assert {"method", "module", "head", "metric", "mean", "std", "count"} <= set(rows[0])


def test_what_was_never_counted_is_null_in_json(run: Run, trace: Path) -> None:
    """Random numbers leave no NaN; a folder's may."""
    run("analyze", trace, "--topk", "2", "--no-plots")
    path = Path("results/tiny/metrics.parquet")
    metrics = pd.read_parquet(path)
    metrics.loc[0, ["mean", "count"]] = float("nan"), 0
    metrics.to_parquet(path)
    facts = path.with_name("run.json")
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "tables": {}}))
    result = run("analyze", trace, "--topk", "2", "--no-plots", "--format", "json")
    assert json.loads(result.stdout)[0]["mean"] is None


def test_csv(run: Run, trace: Path) -> None:
    result = run("analyze", trace, "--topk", "3", "--format", "csv", "--no-plots")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert {row["method"] for row in rows} == {"exact"}
    assert len({(row["layer"], row["head"]) for row in rows}) == 3 * 4


def test_another_method_adds_to_the_folder(run: Run, trace: Path) -> None:
    run("analyze", trace, "--topk", "5", "--no-plots")
    result = run("analyze", trace, "--topk", "5", "--method", "window", "--no-plots")
    assert "### window" in result.stdout
    assert "### exact" not in result.stdout  # only what was asked for
    assert Results.load("results/tiny").methods() == ["exact", "window"]


def test_the_newest_trace_is_taken(run: Run, trace: Path, new_trace: Callable[..., None]) -> None:
    new_trace(Path("newer.zarr"), seed=1)
    old = trace.stat().st_mtime - 100
    for path in (trace / "done").rglob("*"):
        os.utime(path, (old, old))
    result = run("analyze", "--topk", "5", "--no-plots")
    assert "newer.zarr, the newest trace here" in result.stderr
    assert Path("results/newer/run.json").exists()


def test_an_interrupted_trace_is_named(run: Run, new_trace: Callable[..., None]) -> None:
    new_trace(Path("cut.zarr"), finished=1)
    result = run("analyze", "cut.zarr", "--topk", "5", "--no-plots")
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    assert "1 of 2 sequences" in line
    assert json.loads(Path("results/cut/run.json").read_text())["sequences"] == [0]


def test_no_cache(run: Run, trace: Path) -> None:
    result = run("analyze", trace, "--topk", "5", "--no-plots", "--no-cache")
    assert not trace.with_name("tiny.exact").exists()
    assert "Exact answers" not in result.stderr


def test_another_traces_folder_is_refused(
    run: Run, trace: Path, new_trace: Callable[..., None]
) -> None:
    new_trace(Path("other.zarr"), seed=1)
    run("analyze", trace, "--topk", "5", "--out", "r", "--no-plots")
    before = Path("r/run.json").read_bytes()
    result = run("analyze", "other.zarr", "--topk", "5", "--out", "r", code=2)
    assert "another trace" in result.stderr and "--overwrite" in result.stderr
    assert Path("r/run.json").read_bytes() == before
    run("analyze", "other.zarr", "--topk", "5", "--out", "r", "--overwrite", "--no-plots")
    assert Path("r/run.json").read_bytes() != before


def test_a_loose_file(run: Run, trace: Path) -> None:
    shutil.copy(Path(__file__).parents[3] / "analyze/methods/window.py", "mine.py")
    result = run("analyze", trace, "--topk", "5", "--method", "mine.py:Window", "--no-plots")
    assert "### mine.py:Window, top-k 5" in result.stdout


def test_all_methods(run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "faiss" else find(name, *rest),
    )
    result = run(
        "analyze", trace, "--method", "all", "--topk", "2,5", "--layers", "0", "--no-plots"
    )
    missing = [line for line in result.stderr.splitlines() if "a library is missing" in line]
    [faiss] = [line for line in missing if "hnsw, ivf, ivf-pq" in line]
    assert "pip install 'retrace-attention[faiss]'" in faiss
    # How positions are encoded is not known of this trace.
    assert "Left out: expected-attention needs keys before position encoding" in result.stderr
    assert "### Means over layers and heads" in result.stdout
    lines = result.stdout.splitlines()
    assert len([line for line in lines if line.startswith("| quest, ")]) == 2
    assert not [line for line in lines if line.startswith(("| hnsw, ", "| expected-attention, "))]


def test_a_method_that_is_named_is_not_left_out(trace: Path) -> None:
    with pytest.raises(RetraceError, match="expected-attention needs keys before position"):
        analyze(trace, ["all", "expected-attention"], [2], layers=[0])


def test_dry_run(run: Run, trace: Path) -> None:
    there = set(Path().rglob("*"))
    result = run("analyze", trace, "--topk", "5", "--dry-run", "--format", "json")
    cost = json.loads(result.stdout)
    assert (cost["tasks"], cost["units"]) == (6, 12)
    assert "6 layers of sequences, 12 kv heads" in run("analyze", trace, "--dry-run").stdout
    assert set(Path().rglob("*")) == there


def test_dry_run_knows_no_cluster(run: Run, trace: Path) -> None:
    options = ["--dry-run", "--scheduler", "tcp://127.0.0.1:1"]
    assert "leave out --scheduler" in run("analyze", trace, *options, code=2).stderr


def test_locality(run: Run, trace: Path) -> None:
    result = run("analyze", trace, "--topk", "5", "--out", "here", "--no-plots", "--locality")
    assert "### Keys from query to query" in result.stdout
    assert "| Keys For 90% Hits |" in result.stdout
    assert Results.load("here").followed("exact") == {5}
    plain = run("analyze", trace, "--topk", "5", "--out", "there", "--no-plots")
    assert "Keys from query to query" not in plain.stdout


def test_locality_of_blocks_of_queries(run: Run, trace: Path) -> None:
    method = ("--method", "a-shape:block=8", "--protocol", "prefill:8")
    result = run("analyze", trace, *method, "--topk", "16", "--locality", code=2)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "under prefill:8 the queries of a block share those that a-shape:block=8 chose" in line


def test_methods_at_equal_bytes(run: Run, trace: Path) -> None:
    methods = ("--method", "random", "--method", "window", "--method", "exact")
    asked = ("analyze", trace, *methods, "--topk", "2,5,9", "--no-plots", "--at-bytes")
    result = run(*asked, "0.3")
    results = Results.load("results/tiny")
    found = results.at_bytes([0.3], metrics=["attention_fraction"]).set_index("method")["mean"]
    there = found.dropna().sort_values(ascending=False)
    assert 0 < len(there) < 3  # some read more, or less
    table = result.stdout.partition("### At 30.0% of the bytes of full attention")[2]
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert lines[2:] == list(there.index)
    for method in found.index.difference(there.index):
        assert f"{method} (" in table.splitlines()[-1]
    rows = json.loads(run(*asked, "0.3,0.4", "--format", "json").stdout)
    assert {row["share"] for row in rows} == {0.3, 0.4}
    figures = {r["method"]: r["mean"] for r in rows if r["metric"] == "attention_fraction"}
    assert {r["method"] for r in rows if r["mean"] is None} and set(figures) == set(found.index)
    assert len(list(csv.DictReader(io.StringIO(run(*asked, "0.3", "--format", "csv").stdout)))) > 3
    refused = run(*asked, "12%", code=2)
    assert "'12%' is no share of the bytes, such as 0.125" in refused.stderr
