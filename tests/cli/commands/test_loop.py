"""Methods in the loop, from the command line: `capture --approximate`, `compare`, `evaluate`."""

import csv
import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from retrace.analyze import Drift

Run = Callable[..., Result]


@pytest.fixture
def exact(run: Run, model: Path, text: Path) -> str:
    run(
        "capture", "--pretrained", model, "--text", text, "--limit", "2", "--max-length", "60",
        "--out", "exact.zarr",
    )  # fmt: skip
    return "exact.zarr"


def read_csv(text: str) -> list[dict[str, str]]:
    return [*csv.DictReader(io.StringIO(text))]


def test_compare(run: Run, exact: str) -> None:
    run(
        "capture", "--reference", exact, "--approximate", "window", "--topk", "4",
        "--out", "w.zarr",
    )  # fmt: skip
    result = run("compare", exact, "w.zarr")
    assert "Drift: window, top-k 4" in result.stdout
    assert "Likelihood, in nats per token" in result.stdout
    folder = Path("results/exact-drift")
    there = {file.name for file in folder.iterdir()}
    assert there == {*Drift.files(), "plots"}
    told = json.loads(run("compare", exact, "w.zarr", "--format", "json", "--no-plots").stdout)
    assert [row["layer"] for row in told["layers"]] == [0, 1]
    assert told["layers"][0]["query"] == 0 != told["layers"][1]["query"]
    rows = read_csv(run("compare", exact, "w.zarr", "--format", "csv", "--no-plots").stdout)
    assert [float(row["query"]) for row in rows] == [row["query"] for row in told["layers"]]
    assert {row["perplexity"] for row in rows} == {str(told["runs"][0]["perplexity"])}
    assert "w.zarr is not the exact run" in run("compare", "w.zarr", "w.zarr", code=2).stderr


def test_evaluate(run: Run, exact: str) -> None:
    result = run("evaluate", exact, "--method", "window", "--method", "quest:page=2", "--topk", "4")
    for words in ("In the loop, and by replay", "window, 4", "quest:page=2, 4", "Bytes ratio"):
        assert words in result.stdout
    assert Path("results/exact-evaluation/plots/loss-by-replay.png").stat().st_size > 10_000
    Path("run.yaml").write_text("topk: 4\nno-plots: true\nmethod: [window, {quest: {page: [2]}}]")
    result = run("evaluate", exact, "--config", "run.yaml", "--format", "json")
    told = json.loads(result.stdout)  # what was there, and is not run again
    assert {row["method"] for row in told} == {"window", "quest:page=2"}
    rows = read_csv(run("evaluate", exact, "--config", "run.yaml", "--format", "csv").stdout)
    assert [float(row["perplexity"]) for row in rows] == [row["perplexity"] for row in told]
    page = run("evaluate", exact, "--config", "run.yaml", "--format", "markdown").stdout
    assert "### In the loop" in page and "| window, 4 |" in page
    assert "no attention in layer 7" in run(
        "evaluate", exact, "--method", "window", "--topk", "4", "--dense-layers", "7",
        "--out", "other", code=2,
    ).stderr  # fmt: skip


@pytest.mark.filterwarnings("default")  # of packages that lm-eval-harness brings
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
def test_tasks(run: Run, model: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(place / "cache"))
    row = {"question": "word1 word2 word3 word4", "choices": ["word5 word6", "word7"], "answer": 1}
    Path("rows.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    Path("local.yaml").write_text(json.dumps(task))  # YAML holds JSON
    asked = ["evaluate", "--pretrained", model, "--method", "window", "--topk", "4"]
    asked += ["--tasks", "local", "--include-path", place]
    assert "needs one: this model cannot be scored" in run(*asked, code=2).stderr
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    able = place / "able"
    shutil.copytree(model, able)
    (able / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "eos_token": "word0"}))
    asked[2] = able
    result = run(*asked)
    for words in ("Scores with a method in the loop", "local, acc", "window, 4", "Documents"):
        assert words in result.stdout
    there = {file.name for file in Path("results/able-tasks").iterdir()}
    assert there == {"scores.parquet", "documents.parquet", "scores.md", "scores.json"}
    told = json.loads(
        run(*asked, "--format", "json").stdout
    )  # what was there, and is not run again
    assert [(row["metric"], row["documents"]) for row in told] == [("acc", 3), ("acc_norm", 3)]


def test_what_evaluate_cannot_do(run: Run) -> None:
    asked = ["evaluate", "--method", "window", "--topk", "4"]
    assert "Name a trace (EXACT), or tasks" in run(*asked, code=2).stderr
    assert "--limit is for tasks" in run(*asked, "x.zarr", "--limit", "3", code=2).stderr
