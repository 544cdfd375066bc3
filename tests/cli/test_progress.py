"""Whatever takes time shows on a terminal that it goes on, and leaves pipes alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]
TERMINAL = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "100"}
METHODS = ("--method", "window", "--topk", "4", "--no-plots")


@pytest.fixture
def four(new_trace: Callable[..., None]) -> Path:
    """A trace of four sequences."""
    new_trace(Path("four.zarr"), sequences=4)
    return Path("four.zarr")


COMMANDS: dict[str, tuple[str | Path, ...]] = {
    "Replaying": ("analyze", "four.zarr", *METHODS, "--out", "r"),
    "Learning": ("calibrate", "four.zarr", "loki"),
    "Exporting": ("export", "four.zarr", "--format", "numpy"),
    "Reading": ("verify", "four.zarr"),
}


@pytest.mark.parametrize("word", COMMANDS)
def test_on_a_terminal_and_in_a_pipe(run: Run, four: Path, word: str) -> None:
    shown = run(*COMMANDS[word], env=TERMINAL).stderr
    assert word in shown and "━" in shown
    silent = run(*COMMANDS[word], env={"FORCE_COLOR": ""})
    assert word not in silent.stderr and "\x1b" not in silent.stdout + silent.stderr


def test_parts_are_merged_drawn_and_reported(run: Run, four: Path) -> None:
    for part in ("1/2", "2/2"):
        run("analyze", four, *METHODS, "--out", "r", "--part", part)
    merged = run("merge", "r", env=TERMINAL).stderr
    assert "Merging" in merged and "Drawing" in merged
    assert "Writing the page" in run("report", "r", env=TERMINAL).stderr


def test_a_capture(run: Run, model: Path, text: Path) -> None:
    arguments = ("--pretrained", model, "--text", text, "--limit", "2", "--max-length", "40")
    shown = run("capture", *arguments, "--out", "t.zarr", env=TERMINAL).stderr
    assert "Recording" in shown and "2/2 sequences" in shown
