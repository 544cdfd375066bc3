"""What README and pages show runs: their Python, their commands, their methods."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from retrace.analyze import Results, analyze
from retrace.analyze.metrics.registry import table
from retrace.cli.main import main
from retrace.traces import open_trace
from tests.cli.pages import MADE, PAGES, ROOT, Block, blocks

Run = Callable[..., Result]
BLOCKS = [block for page in PAGES if page.name not in MADE for block in blocks(page)]
COMMANDS = [
    (b.page, words)
    for b in BLOCKS
    for words in b.commands()
    if words[0] == "retrace" and words[1][0] != "-"
]
RUN = {
    page.name: [b for b in BLOCKS if b.page == page.name and b.why_not is None] for page in PAGES
}
PROGRAMS = {"retrace", "pip", "python", "make", "git", "cd"}
"""Whatever else a command line begins with, no test runs."""
DRAW = {"analyze", "sweep", "merge"}
"""Commands that take most of their time for plots, which other tests look at."""
SMALLER = {"builtin:smollm2": "smollm2", "1024": "600"}
"""What stands in for a real model and its sequences."""
EXTRAS = set(
    tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
)


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture
def small_model(model: Path, place: Path) -> Path:
    """A tiny model in place of SmolLM2: of its name, and for as many positions."""
    folder = place / "smollm2"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


@pytest.fixture
def small_trace(place: Path, written_trace: Path) -> Path:
    """A tiny trace under the name that pages have."""
    path = Path("traces/smollm2-topics.zarr")
    shutil.copytree(written_trace, path)
    return path


def write_files(steps: list[Block]) -> None:
    for block in steps:
        if block.file is not None:
            Path(block.file).parent.mkdir(exist_ok=True)
            Path(block.file).write_text(block.code)


def test_nothing_is_overlooked() -> None:
    assert len(COMMANDS) > 50
    assert sum(len(found) for found in RUN.values()) > 30
    files = {block.file for block in BLOCKS if block.file}
    assert files >= {"knorm.py", "top.py", "sweep.yaml", "test_knorm.py"}


@pytest.mark.parametrize("name", sorted({name for name, _ in COMMANDS}))
def test_every_command_can_be_read(place: Path, name: str) -> None:
    """Its options are there and have such values, whether or not a test runs it."""
    write_files([block for block in BLOCKS if block.page == name])
    group = click.Context(main, info_name="retrace", **main.context_settings)
    for words in (words for of, words in COMMANDS if of == name):
        known, command, rest = main.resolve_command(group, words[1:])
        assert known is not None and command is not None
        command.make_context(known, rest, parent=group)


def test_commands_of_other_programs_say_that_they_are_not_run() -> None:
    for block in BLOCKS:
        for words in block.commands():
            assert words[0] in PROGRAMS or block.why_not is not None, (
                f"{block.page}: put `<!-- not run: why -->` above the block with {words}"
            )


def test_the_extras_that_pages_name() -> None:
    for page in PAGES:
        for named in re.findall(r"(?:\.|attention)\[([\w,-]+)\]'", page.read_text("utf-8")):
            assert EXTRAS >= {*named.split(",")}, page.name


@pytest.mark.parametrize("name", [name for name, found in RUN.items() if found])
def test_a_page_runs(run: Run, place: Path, request: pytest.FixtureRequest, name: str) -> None:
    """Its files are written, then its commands and Python run in order, in one folder."""
    steps = RUN[name]
    captures = any(words[:2] == ["retrace", "capture"] for b in steps for words in b.commands())
    if any("xarray" in block.code for block in steps):
        pytest.importorskip("xarray", reason="needs the dev extra")
    fixture = "small_model" if captures else "small_trace"
    request.getfixturevalue(fixture)
    request.getfixturevalue("monkeypatch").syspath_prepend(str(place))
    write_files(steps)
    tests = [b.file for b in steps if b.file and Path(b.file).name.startswith("test_")]
    try:
        for block in steps:
            if block.language == "sh":
                run_shell(run, block)
            elif block.language == "python" and block.file is None:
                exec(compile(block.code, f"{name}: {block.code[:40]}", "exec"), {})
        for file in tests:
            assert file is not None
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
            told = subprocess.run(command, capture_output=True, text=True)
            assert told.returncode == 0, told.stdout
    finally:
        for block in steps:  # or another page would find this one's
            if block.file is not None:
                sys.modules.pop(Path(block.file).stem, None)


def run_shell(run: Run, block: Block) -> None:
    for line, words in zip(block.lines(), block.commands(), strict=True):
        if words[0] == "retrace":
            quick = ["--no-plots"] if words[1] in DRAW else []
            run(*(SMALLER.get(word, word) for word in words[1:]), *quick)
        elif words[0] == "python":
            subprocess.run(line.replace("python", sys.executable, 1), shell=True, check=True)


def test_a_method_takes_eighteen_lines() -> None:
    (knorm,) = {b.code for b in BLOCKS if b.file == "knorm.py"}  # README and guide alike
    assert len(knorm.splitlines()) <= 18


def test_the_function_is_exact_attention(small_trace: Path) -> None:
    (code,) = (b.code for b in BLOCKS if b.file == "top.py")
    Path("top.py").write_text(code)
    results = analyze(small_trace, ["./top.py:top", "exact"], [10])
    tables = [results.table(method, 10).drop(columns="Method") for method in results.methods()]
    assert tables[0]["Mean Recall"].min() == 1
    for column in ("Mean Error Norm", "Std Error Norm"):
        assert tables[0][column].tolist() == pytest.approx(tables[1][column].tolist(), abs=1e-5)


def test_the_layout_of_a_trace(small_trace: Path) -> None:
    import zarr

    text = page("docs/trace-format.md")
    group = zarr.open_group(small_trace, mode="r")
    for name, array in [*group.arrays(), *group["layers/1"].arrays()]:  # type: ignore[union-attr]
        axes = ", ".join(array.metadata.dimension_names)
        assert re.search(rf"\b{name}\b", text)
        assert f"({axes})" in text, name


def test_every_metric_is_defined() -> None:
    assert table() in page("docs/metrics.md"), (
        "put what `retrace.analyze.metrics.registry.table()` gives there"
    )


def test_the_files_of_a_results_folder(run: Run, small_trace: Path) -> None:
    run("analyze", small_trace, "--topk", "5")
    text = page("docs/results-format.md")
    for file in Path("results/smollm2-topics").iterdir():
        assert f"`{file.name}{'/' if file.is_dir() else ''}`" in text
    assert Results.load("results/smollm2-topics").methods() == ["exact"]
    assert open_trace(small_trace).sequences == (0, 1)
