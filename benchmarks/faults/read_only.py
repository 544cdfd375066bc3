"""What commands do where nothing can be written."""

import shutil
from pathlib import Path

from benchmarks.faults.analyze import METHODS, TOPK, Runs
from benchmarks.faults.capture import Captures
from benchmarks.faults.mounts import read_only


def section(captures: Captures, count: int) -> list[str]:
    """Each of them, once however often faults are tried."""
    runs = Runs(captures.folder / "read-only-runs", captures.first)
    place, closed = runs.begin("read-only"), runs.folder / "closed"
    runs.run(place, workers=1)
    before = (place / "r" / "metrics.parquet").read_bytes()
    shutil.rmtree(next((place / "t.exact").iterdir()))  # answers that are to be computed anew
    bare, fresh = runs.begin("bare"), runs.folder / "fresh"
    lines = ["On a file system that is mounted read-only:", "", "| command | what came of it |"]
    lines.append("|---|---|")

    def add(command: str, arguments: list[str | Path], out: Path | None = None) -> None:
        code, said = _typed(arguments)
        if out is not None:
            same = (out / "metrics.parquet").read_bytes() == runs.whole
            said = f"{'the same' if same else 'ANOTHER'} metrics.parquet. {said}"
        said = said.replace(str(closed), "PLACE").replace(str(runs.folder), "")
        lines.append(f"| {command} | exit code {code}: {said} |")

    methods = [part for name in METHODS for part in ("--method", name)]
    analyze = [*methods, "--topk", ",".join(map(str, TOPK)), "--no-plots", "--workers", "1"]
    captured: list[str | Path] = [
        *("capture", "--pretrained", captures.model, "--text", captures.text)
    ]
    with read_only(bare, closed) as there:
        if not there:
            return [*lines, "| (not to be had on this machine) | |"]
        add("capture into it", [*captured, "--limit", "1", "--out", closed / "new.zarr"])
        add(
            "analyze a trace on it, results elsewhere",
            ["analyze", closed / "t.zarr", *analyze, "--out", fresh],
            fresh,
        )
        add("verify it", ["verify", closed / "t.zarr"])
    with read_only(place, closed):
        other = closed / "new"
        add(  # figures differ in their last bits where exact answers are read
            "analyze a trace on it with some exact answers beside it",
            ["analyze", closed / "t.zarr", *analyze, "--out", runs.folder / "again"],
        )
        add("analyze into it", ["analyze", bare / "t.zarr", *analyze, "--out", other])
        add(
            "analyze into results on it, with another method",
            [
                "analyze",
                bare / "t.zarr",
                "--method",
                "window",
                "--topk",
                "2",
                "--out",
                closed / "r",
            ],
        )
        add("report into it", ["report", closed / "r", "--out", closed / "report.html"])
    assert (place / "r" / "metrics.parquet").read_bytes() == before
    return lines


def _typed(arguments: list[str | Path]) -> tuple[int, str]:
    """The exit code of a command, and what it said last that is no page."""
    from click.testing import CliRunner

    from retrace.cli.main import main

    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    wrong = result.exception
    if wrong is not None and not isinstance(wrong, SystemExit):
        return 1, f"TRACEBACK {wrong!r}"
    told = [line for line in result.stderr.splitlines() if line.startswith(("Error", "Warning"))]
    return result.exit_code, " ".join(told) or "nothing to say."
