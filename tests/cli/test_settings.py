"""The same settings from flags, the environment and a file, in that order of strength."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from retrace.analyze import parse_spec
from retrace.cli.parameters import names, numbers

Run = Callable[..., Result]


def printed(result: Result) -> list[str]:
    """The methods and budgets of the printed tables."""
    return re.findall(r"^### (.*, top-k .*)$", result.stdout, re.MULTILINE)


@pytest.fixture
def config(place: Path) -> Path:
    """A file that asks for two methods at one budget."""
    path = place / "run.yaml"
    path.write_text("method: [window, random]\ntopk: 4\nno-plots: true\nmin_context: 20\n")
    return path


def test_a_file(run: Run, trace: Path, config: Path) -> None:
    result = run("analyze", trace, "--config", config)
    assert printed(result) == ["window, top-k 4", "random, top-k 4"]
    assert json.loads(Path("results/tiny/run.json").read_text())["min_context"] == 20


def test_the_environment_is_stronger_than_a_file(run: Run, trace: Path, config: Path) -> None:
    result = run("analyze", trace, "--config", config, env={"RETRACE_ANALYZE_TOPK": "6"})
    assert printed(result) == ["window, top-k 6", "random, top-k 6"]


def test_a_flag_is_stronger_than_both(run: Run, trace: Path, config: Path) -> None:
    env = {"RETRACE_ANALYZE_TOPK": "6", "RETRACE_ANALYZE_METHOD": "quest"}
    result = run("analyze", trace, "--config", config, "--topk", "7", env=env)
    assert printed(result) == ["quest, top-k 7"]


def test_a_single_value_where_a_list_may_be(run: Run, trace: Path) -> None:
    Path("run.yaml").write_text("method: window\ntopk: [2, '4-5']\nno_plots: true\n")
    assert printed(run("analyze", trace, "--config", "run.yaml")) == [
        "window, top-k 2",
        "window, top-k 4",
        "window, top-k 5",
    ]


def test_a_grid_in_a_file(run: Run, trace: Path) -> None:
    Path("sweep.yaml").write_text(
        "topk: 4\nno_plots: true\nmethod:\n"
        "  - exact\n  - quest: {page: [2, 4], pool: [none, sum]}\n  - window:\n"
    )
    shown = ("--format", "json", "--no-cache", "--out")
    grid = json.loads(run("analyze", trace, "--config", "sweep.yaml", *shown, "grid").stdout)
    names = ["exact", "quest:page=2,pool=none", "quest:page=2,pool=sum", "quest:page=4,pool=none"]
    names += ["quest:page=4,pool=sum", "window"]
    assert {row["method"] for row in grid} == {str(parse_spec(name)) for name in names}
    # ... to the bit what a run of one method gives.
    options = ("--method", names[3], "--topk", "4", "--no-plots")
    alone = run("analyze", trace, *options, *shown, "alone").stdout
    spec = str(parse_spec(names[3]))
    assert [row for row in grid if row["method"] == spec] == json.loads(alone)


def test_the_trace_may_be_in_the_file(run: Run, trace: Path) -> None:
    Path("run.yaml").write_text(f"trace: {trace}\ntopk: 4\nno_plots: true\nout:\n")
    result = run("analyze", "--config", "run.yaml")
    assert "newest" not in result.stderr
    assert printed(result) == ["exact, top-k 4"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("top_k: 4", ["'top_k'", "Did you mean", "topk"]),
        ("- 4", ["limit: 10"]),
        ("a: [", ["cannot be read as YAML"]),
        ("min_context: soon", ["min-context", "soon"]),
    ],
)
def test_mistakes_in_a_file(run: Run, trace: Path, content: str, words: list[str]) -> None:
    Path("run.yaml").write_text(content)
    result = run("analyze", trace, "--config", "run.yaml", code=2)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    for word in words:
        assert word in line


def test_a_missing_file(run: Run, trace: Path) -> None:
    assert (
        "nothing.yaml cannot be read"
        in run("analyze", trace, "--config", "nothing.yaml", code=2).stderr
    )


def test_both_spellings(run: Run, trace: Path) -> None:
    result = run("analyze", trace, "--min_context", "100", "--topk", "9", "--no_plots")
    assert printed(result) == ["exact, top-k 9"]


def test_lists_of_numbers() -> None:
    assert numbers("1-3, 7") == (1, 2, 3, 7)
    assert numbers([1, "4-5"]) == (1, 4, 5)
    assert numbers(10) == (10,)


def test_lists_of_names() -> None:
    assert names("wikitext, other,") == ("wikitext", "other")
    assert names(["wikitext"]) == ("wikitext",)
