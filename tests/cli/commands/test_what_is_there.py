"""`retrace info`, `traces` and `methods` answer what is there."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from retrace.analyze import method_names
from retrace.analyze.methods.describe import LEVELS
from retrace.cli.screen import plural, ranges, size
from retrace.traces import open_trace

Run = Callable[..., Result]


def test_info(run: Run, trace: Path) -> None:
    page = run("info", trace).stdout
    for words in ("tiny", "text (tiny.txt)", "2 of 2 finished, 260 tokens, 130 each", "float32"):
        assert words in page
    page = run("info", trace, "--format", "table").stdout
    rows = [line.split() for line in page.splitlines() if "model.layers.*.self_attn" in line]
    assert rows == [
        ["0-1", "model.layers.*.self_attn", "4", "2", "8", "0.353553", "-"],
        ["2", "model.layers.*.self_attn", "4", "2", "8", "0.353553", "16"],
    ]


def test_info_as_json(run: Run, trace: Path) -> None:
    facts = json.loads(run("info", trace, "--format", "json").stdout)
    assert facts["sequences"] == {"finished": 2, "planned": 2}
    assert facts["bytes"] == open_trace(trace).nbytes()
    assert [group["layers"] for group in facts["layers"]] == [[0, 1], [2]]
    assert facts["unrecorded_layers"] == [3]
    assert facts["perplexity"] == pytest.approx(open_trace(trace).perplexity())


def test_info_in_markdown_and_as_csv(run: Run, trace: Path) -> None:
    """Markdown is what goes into a pipe; a row of CSV is of layers with the same rules."""
    page = run("info", trace).stdout
    assert page == run("info", trace, "--format", "markdown").stdout
    assert "\nDtype              float32\n" in page
    assert "| 2 | model.layers.*.self_attn | 4 | 2 | 8 | 0.353553 | 16 |" in page
    rows = [*csv.DictReader(io.StringIO(run("info", trace, "--format", "csv").stdout))]
    assert [(row["layers"], row["window"], row["kv_heads"]) for row in rows] == [
        ("0-1", "", "2"),
        ("2", "16", "2"),
    ]


def test_info_of_an_unfinished_trace(run: Run, new_trace: Callable[..., None]) -> None:
    new_trace(Path("t.zarr"), finished=0)
    page = run("info", "t.zarr").stdout
    assert "0 of 2 finished" in page and "--resume" in page
    assert json.loads(run("info", "t.zarr", "--format", "json").stdout)["perplexity"] is None


def test_traces(run: Run, trace: Path, new_trace: Callable[..., None]) -> None:
    new_trace(Path("cut.zarr"), finished=1)
    lines = run("traces").stdout
    assert "traces/tiny.zarr" in lines and "1/2" in lines
    found = json.loads(run("traces", "--format", "json").stdout)
    assert {one["trace"]: one["finished"] for one in found} == {
        "traces/tiny.zarr": 2,
        "cut.zarr": 1,
    }
    assert found[0]["tokens"] == 260 or found[1]["tokens"] == 260


def test_traces_as_csv(run: Run, trace: Path) -> None:
    (row,) = csv.DictReader(io.StringIO(run("traces", "--format", "csv").stdout))
    wanted = {"trace": str(trace), "model": "tiny", "layers": "0-2", "finished": "2"}
    assert wanted.items() <= row.items()
    assert f"| {trace} | tiny |" in run("traces", "--format", "markdown").stdout


def test_no_traces(run: Run, place: Path) -> None:
    result = run("traces")
    assert not result.stdout and "retrace capture" in result.stderr
    assert json.loads(run("traces", "--format", "json").stdout) == []


def test_methods(run: Run) -> None:
    page = run("methods").stdout
    found = json.loads(run("methods", "--format", "json").stdout)
    assert [one["name"] for one in found] == method_names()
    for one in found:
        assert one["name"] in page
        assert one["level"] in LEVELS
        assert one["summary"] and one["source"]
        assert all(parameter["help"] for parameter in one["parameters"])


def test_methods_by_family(run: Run) -> None:
    """In 120 columns at most, each method under its level and state."""
    page = run("methods").stdout
    assert max(map(len, page.splitlines())) <= 120
    places = {line.split()[0]: i for i, line in enumerate(page.splitlines()) if line.strip()}
    heads = [(i, line) for i, line in enumerate(page.splitlines()) if line[:1].isalpha()]
    for one in json.loads(run("methods", "--format", "json").stdout):
        above = [line for i, line in heads if i < places[one["name"]]][-1]
        assert above.startswith(f"{one['level']}: ")
        state = "one quantity per key" if not one["fitted"] else "earlier keys"
        assert ("learnt" if one["calibrated"] else state) in above


def test_shared_parameters_are_told_once(run: Run) -> None:
    page = run("methods", "--format", "markdown").stdout
    for name in ("cache", "pool", "keep", "budget", "output"):
        assert page.count(f"\n| `{name}` |") == 1
    quest = page.partition("## quest\n")[2].partition("\n## ")[0]
    assert "- Shared parameters: `cache=none`, `pool=" in quest and "| `page` | `16` |" in quest


def test_the_page_of_methods_is_current(run: Run) -> None:
    page = Path(__file__).parents[3] / "docs/methods.md"
    wanted = run("methods", "--format", "markdown").stdout
    assert page.read_text(encoding="utf-8") == wanted, (
        "run `retrace methods --format markdown > docs/methods.md`"
    )


def test_one_method(run: Run) -> None:
    page = run("methods", "quest").stdout
    for words in ("arXiv:2406.10774", "keys in a page", "16", "score", "Two vectors per page"):
        assert words in page


def test_a_method_in_a_file(run: Run, place: Path) -> None:
    source = Path(__file__).parents[3] / "analyze/methods/quest.py"
    assert "keys in a page" in run("methods", f"{source}:Quest").stdout


def test_numbers_in_words() -> None:
    assert size(999) == "999 bytes"
    assert size(2_500_000_000) == "2.5 GB"
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert ranges([]) == ""
    assert (plural(1, "layer"), plural(2000, "layer")) == ("1 layer", "2,000 layers")
