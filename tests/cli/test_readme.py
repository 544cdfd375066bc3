"""What the README shows runs: its Python, its commands, its methods."""

import itertools
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from retrace.analyze import Results, analyze
from retrace.analyze.metrics.registry import table
from retrace.traces import open_trace

Run = Callable[..., Result]
README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
FILES = {
    match[1]: code
    for language, code in BLOCKS
    if language == "python" and (match := re.match(r"# (\w+\.py)\n", code))
}
SNIPPETS = [code for language, code in BLOCKS if language == "python" and code[:1] != "#"]
COMMANDS = [
    line
    for language, code in BLOCKS
    if language == "sh"
    for line in code.splitlines()
    if line.startswith("retrace analyze --method ./")
]


@pytest.fixture
def readme_trace(place: Path, written_trace: Path) -> Path:
    """A tiny trace under the name of the README's, with the files that the README shows."""
    path = Path("traces/smollm2-topics.zarr")
    shutil.copytree(written_trace, path)
    for name, code in FILES.items():
        Path(name).write_text(code)
    return path


def test_nothing_is_overlooked() -> None:
    assert set(FILES) == {"knorm.py", "top.py"}
    assert len(SNIPPETS) == 4
    assert len(COMMANDS) == 2


def test_a_method_takes_eighteen_lines() -> None:
    assert len(FILES["knorm.py"].splitlines()) <= 18


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["objects", "python", "xarray", "zarr"])
def test_snippets_run(readme_trace: Path, snippet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path.cwd()))
    exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(run: Run, readme_trace: Path, command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "retrace"
    methods = [after for flag, after in itertools.pairwise(arguments) if flag == "--method"]
    titles = [line for line in run(*arguments, "--no-plots").stdout.splitlines() if "###" in line]
    assert titles[:-1] == [f"### {method.removeprefix('./')}, top-k 10" for method in methods]
    assert titles[-1].startswith("### Means over layers and heads")


def test_the_function_is_exact_attention(readme_trace: Path) -> None:
    results = analyze(readme_trace, ["./top.py:top", "exact"], [10])
    tables = [results.table(method, 10).drop(columns="Method") for method in results.methods()]
    assert tables[0]["Mean Recall"].min() == 1
    for column in ("Mean Error Norm", "Std Error Norm"):
        assert tables[0][column].tolist() == pytest.approx(tables[1][column].tolist(), abs=1e-5)


def test_the_layout_of_a_trace(readme_trace: Path) -> None:
    import zarr

    readme = README.read_text(encoding="utf-8")
    group = zarr.open_group(readme_trace, mode="r")
    for name, array in [*group.arrays(), *group["layers/1"].arrays()]:  # type: ignore[union-attr]
        axes = ", ".join(array.metadata.dimension_names)
        assert re.search(rf"\b{name}\b", readme)
        assert f"({axes})" in readme, name


def test_every_metric_is_defined() -> None:
    readme = README.read_text(encoding="utf-8")
    assert table() in readme, "put what `retrace.analyze.metrics.registry.table()` gives there"


def test_the_files_of_a_results_folder(run: Run, readme_trace: Path) -> None:
    run("analyze", readme_trace, "--topk", "5")
    readme = README.read_text(encoding="utf-8")
    for file in Path("results/smollm2-topics").iterdir():
        assert f"`{file.name}{'/' if file.is_dir() else ''}`" in readme
    assert Results.load("results/smollm2-topics").methods() == ["exact"]
    assert open_trace(readme_trace).sequences == (0, 1)
