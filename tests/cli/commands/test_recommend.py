"""`retrace recommend`: what it prints where, what it writes, and mistakes in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from retrace.analyze import Recommendation, recommend

Run = Callable[..., Result]
ASKED = ("--method", "window", "--method", "exact", "--topk", "8,32")


@pytest.fixture
def four(new_trace: Callable[..., None]) -> Path:
    """A trace of four sequences."""
    new_trace(Path("four.zarr"), sequences=4)
    return Path("four.zarr")


def test_tables_on_stdout_and_words_on_stderr(run: Run, four: Path) -> None:
    result = run("recommend", four, "--target", "error_norm=0.5", *ASKED, "--out", "r.json")
    found = recommend(four, "error_norm=0.5", ["window", "exact"], [8, 32])
    rows = [line for line in result.stdout.splitlines() if line.startswith("| model.layers.")]
    assert len(rows) == len(found.kv_heads) == 6
    for line, row in zip(rows, found.table().to_dict("records"), strict=True):
        assert f"| {row['Method']} | {row['Bytes Ratio']:.4f} |" in line
        assert line.endswith(f"{row['Verify']:.4f} | {row['Met']} |")
    met = found.facts["heads_met"]["verify"]
    assert f"in {met} of 12 heads on the half that verifies" in result.stdout
    assert "sequences 0,2: error_norm" in result.stdout
    assert "sequences 1,3: error_norm" in result.stdout
    assert "Only 2 sequences choose" in result.stderr and "Written: r.json" in result.stderr
    assert Recommendation.load("r.json").to_json() == found.to_json()


def test_json_is_what_is_written(run: Run, four: Path) -> None:
    arguments = ("--target", "bytes_ratio=0.9", *ASKED, "--format", "json", "--out", "r.json")
    result = run("recommend", four, *arguments)
    assert json.loads(result.stdout) == json.loads(Path("r.json").read_text())


def test_methods_of_a_file(run: Run, four: Path) -> None:
    Path("run.yaml").write_text("method: [exact, quest: {page: [4, 8]}]\ntopk: [8, 32]\n")
    asked = ("recommend", four, "--target", "bytes_ratio=0.9", "--format", "json")
    flags = ("--method", "exact", "--method", "quest:page={4,8}", "--topk", "8,32")
    assert run(*asked, "--config", "run.yaml").stdout == run(*asked, *flags).stdout


def test_a_table_for_people(run: Run, four: Path) -> None:
    arguments = ("--target", "recall=0.01", *ASKED, "--layers", "1", "--format", "table")
    result = run("recommend", four, *arguments)
    assert "model.layers.1.self_attn" in result.stdout and "|" not in result.stdout
    assert "One setting" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "eror_norm=0.1"], ["'eror_norm'", "Did you mean error_norm?"]),
        (["--target", "recall=many"], ["'recall=many'", "a number"]),
        (["--target", "error_norm=0.000001", *ASKED], ["Nothing tried meets", "nearest is exact"]),
        (["--target", "recall=0.1", "--method", "qest"], ["Did you mean quest?"]),
        ([], ["--target"]),
    ],
)
def test_mistakes(run: Run, four: Path, arguments: list[str], words: list[str]) -> None:
    result = run("recommend", four, *arguments, code=2)
    assert not result.stdout
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert all(word in line for word in words)


def test_too_few_sequences(run: Run, trace: Path) -> None:
    result = run("recommend", trace, "--target", "recall=0.1", code=2)
    assert "at least 3 sequences" in result.stderr and "--limit" in result.stderr
