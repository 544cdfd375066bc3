"""`retrace report`: a page of results folders, and one line where there is none to be made."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from click.testing import Result

Run = Callable[..., Result]


@pytest.fixture
def results(run: Run, trace: Path) -> Path:
    """A results folder."""
    run("analyze", trace, "--method", "exact", "--method", "quest", "--topk", "5,10", "--no-plots",
        "--out", "r", "--layers", "0,2")  # fmt: skip
    return Path("r")


def test_a_page_is_made_and_replaced(run: Run, results: Path) -> None:
    pytest.importorskip("plotly", reason="needs the report extra")
    result = run("report", results, "--out", "pages/report.html")
    assert result.stderr.startswith("Report: pages/report.html (")
    assert not result.stdout
    first = Path("pages/report.html").read_text(encoding="utf-8")
    assert first.startswith("<!DOCTYPE html>") and first.endswith("</html>\n")
    Path("pages/report.html").write_text("an older one")
    run("report", results, results, "--out", "pages/report.html")
    # A folder named twice is one; nothing is left beside the page.
    assert Path("pages/report.html").read_text(encoding="utf-8") == first
    assert [file.name for file in Path("pages").iterdir()] == ["report.html"]


def test_folders_of_one_name_are_told_apart(run: Run, results: Path) -> None:
    pytest.importorskip("plotly", reason="needs the report extra")
    for place in ("one/r", "other/r"):
        shutil.copytree(results, place)
    run("report", "one/r", "other/r")
    text = Path("report.html").read_text(encoding="utf-8")
    assert "<title>one/r, other/r - retrace report</title>" in text


def test_what_is_no_results_folder(run: Run, results: Path) -> None:
    for wrong, why in (("nowhere", "run.json"), ("traces", "run.json")):
        result = run("report", wrong, "--out", "report.html", code=2)
        assert f"{wrong} is not a results folder of retrace" in result.stderr
        assert why in result.stderr
    metrics = pd.read_parquet("r/metrics.parquet")
    metrics.drop(columns="head").to_parquet("r/metrics.parquet")
    assert "metrics.parquet is not what was written" in run("report", results, code=2).stderr
    facts = json.loads(Path("r/run.json").read_text(encoding="utf-8"))
    del facts["tables"]  # as of a run that kept no digests
    Path("r/run.json").write_text(json.dumps(facts), encoding="utf-8")
    assert "no column head" in run("report", results, code=2).stderr
    metrics.iloc[:0].to_parquet("r/metrics.parquet")
    assert "r holds no figures" in run("report", results, code=2).stderr
    assert not Path("report.html").exists()


def test_the_page_cannot_stand_there(run: Run, results: Path) -> None:
    pytest.importorskip("plotly", reason="needs the report extra")
    assert "is a directory" in run("report", results, "--out", "r", code=2).stderr
    result = run("report", results, "--out", "r/run.json/report.html", code=2)
    assert "r/run.json cannot be written" in result.stderr


def test_without_plotly(run: Run, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    result = run("report", results, code=2)
    assert "pip install 'retrace-attention[report]'" in result.stderr
    assert not Path("report.html").exists()
