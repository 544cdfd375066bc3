"""Places that nothing can be written in are refused in one line, before there is any work."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import retrace.analyze
from retrace.analyze.commands import analyze, compare, export
from retrace.traces import RetraceError
from retrace.traces.output import Output

Run = Callable[..., Result]
FILES = ["folder", "pipe", "below a file", "below a link to nothing", "no leave"]


def place(kind: str) -> str:
    """One of this kind, for a file."""
    if kind == "folder":
        Path("there").mkdir()
    elif kind == "pipe":
        os.mkfifo("there")
    elif kind == "below a file":
        Path("file").write_text("mine")
        return "file/there"
    elif kind == "no leave":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        Path("locked").mkdir(mode=0o500)
        return "locked/there"
    else:
        Path("link").symlink_to("nowhere")
        return "link/there"
    return "there"


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("there was work")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("command", ["report", "recommend"])
def test_files(
    run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch, command: str, kind: str
) -> None:
    monkeypatch.setattr(retrace.analyze.Results, "load", never)
    monkeypatch.setattr(retrace.analyze, "recommend", never)
    asked = ["traces"] if command == "report" else [trace, "--target", "recall=0.9"]
    before = sorted(Path().rglob("*"))
    where = place(kind)
    result = run(command, *asked, "--out", where, code=2)
    [line] = [line for line in result.stderr.splitlines() if line.startswith(("Error:", "Inv"))]
    assert where.partition("/")[0] in line
    left = {file for file in Path().rglob("*") if file not in before}
    assert {file.name for file in left} <= {"there", "file", "link", "locked"}


@pytest.mark.parametrize("kind", FILES[2:])
@pytest.mark.parametrize("command", ["export", "compare"])
def test_folders(
    run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch, command: str, kind: str
) -> None:
    monkeypatch.setattr(export, "vector_set", never)
    monkeypatch.setattr(compare, "compare", never)
    asked = [trace] if command == "export" else [trace, trace]
    where = place(kind)
    result = run(command, *asked, "--layers", "0", "--out", where, code=2)
    assert f"{where.partition('/')[0]}" in result.stderr and "cannot be written" in result.stderr


def test_files_of_a_folder(run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("analyze", trace, "--method", "window", "--topk", "5", "--no-plots", "--out", "r")
    Path("r/table.md").unlink()
    Path("r/table.md").mkdir()
    monkeypatch.setattr(analyze, "replay_all", never)
    result = run("analyze", trace, "--method", "exact", "--topk", "5", "--out", "r", code=2)
    assert "r/table.md is no file" in result.stderr
    monkeypatch.setattr(compare, "compare", never)
    Path("d/runs.csv").mkdir(parents=True)
    assert "d/runs.csv is no file" in run("compare", trace, trace, "--out", "d", code=2).stderr
    monkeypatch.setattr(export, "vector_set", never)
    Path("v/own.hdf5").mkdir(parents=True)
    said = run("export", trace, "--layers", "0", "--out", "v", code=2).stderr
    assert "v/own.hdf5 is no file" in said


def test_two_exports_into_one_folder(run: Run, trace: Path) -> None:
    from retrace.traces.storage.lock import locked_folder

    with locked_folder(Path("v")):
        said = run("export", trace, "--layers", "0", "--out", "v", code=2).stderr
    assert "Another run is writing v" in said


def test_a_trace_at_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.zarr").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RetraceError, match="is a link to what is not there"):
        Output(tmp_path / "t.zarr", overwrite=True, resume=False)
