"""Methods in the loop, from the command line: `capture --approximate`, `compare`, `evaluate`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]


@pytest.fixture
def exact(run: Run, model: Path, text: Path) -> str:
    run(
        "capture", "--pretrained", model, "--text", text, "--limit", "2", "--max-length", "60",
        "--out", "exact.zarr",
    )  # fmt: skip
    return "exact.zarr"


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
    assert there == {"drift.parquet", "likelihoods.parquet", "runs.csv", "plots"}
    told = json.loads(run("compare", exact, "w.zarr", "--format", "json", "--no-plots").stdout)
    assert [row["layer"] for row in told["layers"]] == [0, 1]
    assert told["layers"][0]["query"] == 0 != told["layers"][1]["query"]
    assert "w.zarr is not the exact run" in run("compare", "w.zarr", "w.zarr", code=2).stderr


def test_evaluate(run: Run, exact: str) -> None:
    result = run("evaluate", exact, "--method", "window", "--method", "quest:page=2", "--topk", "4")
    for words in ("In the loop, and by replay", "window, 4", "quest:page=2, 4", "Bytes ratio"):
        assert words in result.stdout
    assert Path("results/exact-evaluation/plots/loss-by-replay.png").stat().st_size > 10_000
    result = run(
        "evaluate", exact, "--method", "window", "--topk", "4", "--format", "json", "--no-plots"
    )
    told = json.loads(result.stdout)  # what was there, and is not run again
    assert {row["method"] for row in told} == {"window", "quest:page=2"}
    assert "no attention in layer 7" in run(
        "evaluate", exact, "--method", "window", "--topk", "4", "--dense-layers", "7",
        "--out", "other", code=2,
    ).stderr  # fmt: skip
