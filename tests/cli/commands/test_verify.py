"""`retrace verify`, and what the other commands do with a damaged trace."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from click.testing import Result

from retrace.analyze import Results, analyze

Run = Callable[..., Result]


@pytest.fixture
def damaged(trace: Path) -> Path:
    """The trace, with a bit flipped in the keys of layer 1 of sequence 0."""
    file = trace / "layers/1/key/c/0/0/0/0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(bytes(data))
    return trace


def test_a_whole_trace(run: Run, trace: Path) -> None:
    result = run("verify", str(trace))
    assert (result.exit_code, result.stderr) == (0, "")
    assert "all 2 whole" in result.stdout
    facts = json.loads(run("verify", str(trace), "--format", "json").stdout)
    assert facts["whole"] is True
    assert facts["damaged"] == []
    assert facts["sequences"] == {"planned": 2, "finished": [0, 1], "whole": [0, 1]}


def test_a_damaged_trace(run: Run, damaged: Path) -> None:
    result = run("verify", str(damaged), code=1)
    assert "checksum does not match" in result.stdout
    assert "1 of 2 whole: 1" in result.stdout
    assert "2 of 3 whole: 0,2" in result.stdout
    assert "--skip-damaged" in result.stdout
    facts = json.loads(run("verify", str(damaged), "--format", "json", code=1).stdout)
    assert facts["damaged"] == [
        {"layer": 1, "tensor": "key", "sequence": 0, "cause": "checksum does not match"}
    ]
    assert facts["layers"] == {"recorded": [0, 1, 2], "whole": [0, 2]}


def test_no_trace(run: Run, place: Path) -> None:
    assert "There is no trace" in run("verify", "nothing.zarr", code=2).stderr


def test_analyze_refuses_by_name(run: Run, damaged: Path) -> None:
    stderr = run("analyze", str(damaged), "--topk", "5", code=2).stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("Error")]
    assert "key of layer 1, sequence 0 is damaged (checksum does not match)" in line
    assert f"`retrace verify {damaged}`" in line
    assert "Traceback" not in stderr


def test_analyze_leaves_it_out_when_told(run: Run, damaged: Path) -> None:
    options = ["--topk", "5", "--no-plots", "--skip-damaged", "--out", "r"]
    stderr = run("analyze", str(damaged), *options).stderr
    assert "Sequence 0 is left out" in stderr
    results = Results.load("r")
    assert results.run["sequences"] == [1]
    assert results.run["damaged_sequences"] == [
        {"sequence": 0, "cause": "key of layer 1, sequence 0: checksum does not match"}
    ]


def test_dry_run_leaves_it_out_too(run: Run, damaged: Path) -> None:
    result = run("analyze", str(damaged), "--topk", "5", "--skip-damaged", "--dry-run")
    assert "Sequence 0 is left out" in result.stderr
    assert "3 layers of sequences" in result.stdout


def test_the_rest_is_as_though_it_had_never_been_there(trace: Path) -> None:
    shutil.copytree(trace, "shorter.zarr")
    Path("shorter.zarr/done/c/0").unlink()
    (trace / "layers/0/query/c/0/0/0/0").unlink()
    skipped = analyze(trace, ["exact", "quest"], [5], skip_damaged=True)
    shorter = analyze("shorter.zarr", ["exact", "quest"], [5])
    pd.testing.assert_frame_equal(skipped.metrics, shorter.metrics)


def test_layers_that_are_whole_need_no_leaving_out(run: Run, damaged: Path) -> None:
    options = ["--topk", "5", "--no-plots", "--skip-damaged", "--layers", "0,2", "--out", "r"]
    assert "left out" not in run("analyze", str(damaged), *options).stderr
    assert Results.load("r").run["sequences"] == [0, 1]


def test_nothing_is_whole(run: Run, damaged: Path) -> None:
    shutil.rmtree(damaged / "layers/1/key")
    stderr = run("analyze", str(damaged), "--topk", "5", "--skip-damaged", code=2).stderr
    assert "No sequence" in stderr
    assert "its zarr.json is missing" in stderr
