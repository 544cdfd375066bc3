"""`retrace show`: what it prints, and whose words tokens are."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from retrace.capture import capture, token_texts
from retrace.traces import RetraceError, open_trace

Run = Callable[..., Result]
PLACE = ("--layer", "1", "--head", "2", "--position", "100")
METHODS = ("--method", "exact", "--method", "window", "--topk", "5")


@pytest.fixture
def captured(place: Path, model: Path, text: Path) -> Path:
    """A trace of the tiny model, whose tokenizer is on this machine."""
    path = place / "words.zarr"
    capture(str(model), text=[str(text)], max_length=120, limit=1, dtype="float32", out=str(path))
    return path


def test_tables(run: Run, trace: Path) -> None:
    done = run("show", trace, *PLACE, *METHODS)
    lines = done.stdout.splitlines()
    assert "Query     sequence 0, position 100" in lines and "Sees      101 keys" in lines
    best = [line for line in lines if line.startswith(("| 1 |", "| 5 |"))]
    assert all("| taken |" in line for line in best) and len(best) == 2
    assert any(line.startswith("| window | 5 |") for line in lines)
    assert "Tokens are shown by their ids" in done.stderr and "names no tokenizer" in done.stderr
    assert run("show", trace, *PLACE, *METHODS, "--format", "table").stdout.count("taken") > 5


def test_for_programs(run: Run, trace: Path) -> None:
    told = json.loads(run("show", trace, *PLACE, *METHODS, "--format", "json").stdout)
    assert (told["layer"], told["head"], told["kv_head"], told["visible"]) == (1, 2, 1, 101)
    assert [row["method"] for row in told["figures"]] == ["exact", "window"]
    text = run("show", trace, *PLACE, *METHODS, "--format", "csv").stdout
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == len(told["keys"])
    for row, own in zip(rows, told["keys"], strict=True):
        assert int(row["key"]) == own["key"] and row["method"] == own["method"]
        assert row["rank"] == ("" if own["rank"] is None else str(own["rank"]))
        assert row["attended"] == str(own["attended"])
        assert float(row["probability"]) == pytest.approx(own["probability"])


def test_words_of_the_tokens(run: Run, captured: Path, text: Path) -> None:
    words = text.read_text().split()
    done = run("show", captured, *PLACE, "--format", "json")
    told = json.loads(done.stdout)
    assert not done.stderr
    assert [row["text"] for row in told["tokens"]] == words[76:101]
    assert all(row["text"] == words[row["key"]] for row in told["keys"])


def test_another_tokenizer(captured: Path, model: Path, place: Path, run: Run) -> None:
    trace = open_trace(captured)
    assert token_texts(trace)([3]) == ["word3"]
    trace.attributes["tokenizer"]["vocabulary"] = 12
    with pytest.raises(RetraceError, match="its vocabulary is 11, and 12 there"):
        token_texts(trace)
    elsewhere = place / "elsewhere"
    shutil.copytree(model, elsewhere)
    trace.attributes |= {"tokenizer": {}, "model": {"pretrained": str(elsewhere)}}
    assert token_texts(trace)([3]) == ["word3"]
    (elsewhere / "tokenizer.json").write_text("{")
    with pytest.raises(RetraceError, match="cannot be read here"):
        token_texts(trace)
    trace.attributes["model"]["pretrained"] = "nobody/has-this-model"
    with pytest.raises(RetraceError, match="Bring it: `hf download nobody/has-this-model"):
        token_texts(trace)


def test_mistakes(run: Run, trace: Path) -> None:
    for arguments, words in (
        (("--layer", "9", "--head", "0", "--position", "1"), "has no layer 9"),
        (("--layer", "0", "--head", "4", "--position", "1"), "has no head 4"),
        (("--layer", "0", "--head", "0", "--position", "130"), "no query at position 130"),
        ((*PLACE, "--method", "quset"), "Did you mean quest"),
        (("--layer", "0", "--head", "0"), "Missing option '--position'"),
    ):
        assert words in " ".join(run("show", trace, *arguments, code=2).stderr.split())
