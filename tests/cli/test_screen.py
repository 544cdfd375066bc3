"""What is printed fits the terminal, and loses nothing where that is narrow."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from retrace.cli import screen
from retrace.cli.screen import print_facts, print_table, print_words

Run = Callable[..., Result]
COLUMNS = ["Layer", "Classes", "Bytes Ratio", "Interval"]
ROWS = [
    ["model.layers.0.self_attn", "diffuse, local", "0.1234", "0.5678 [0.5555, 0.6666]"],
    ["model.layers.11.self_attn", "sink", "1.0000", "0.9999 [0.8888, 1.0000]"],
]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that makes stdout a terminal of this width."""

    def make(width: int) -> None:
        monkeypatch.setattr(screen, "on_terminal", lambda: True)
        monkeypatch.setenv("COLUMNS", str(width))

    return make


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    lines = capsys.readouterr().out.splitlines()
    return lines, " ".join(lines)


@pytest.mark.parametrize("width", [120, 80, 60, 50])
def test_a_table_fits(
    terminal: Callable[[int], None], capsys: pytest.CaptureFixture[str], width: int
) -> None:
    terminal(width)
    print_table(COLUMNS, ROWS, title="Figures", left=["Classes"])
    lines, text = printed(capsys)
    assert max(map(len, lines)) <= width
    for word in ("diffuse,", "0.1234", "0.5678", "[0.5555,", "0.6666]", "1.0000", "Ratio"):
        assert word in text.split()
    assert "…" not in text


def test_no_figure_is_lost_where_nothing_fits(
    terminal: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal(20)
    print_table(COLUMNS, ROWS)
    _, text = printed(capsys)
    for word in ("0.1234", "0.5678", "[0.5555,", "0.6666]"):
        assert word in text.split()


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(COLUMNS, ROWS)
    print_facts([("Words", "many " * 50)])
    lines, _ = printed(capsys)
    assert sum("model.layers" in line and "]" in line for line in lines) == 2
    assert lines[-1].count("many") == 50


def test_facts_and_words_are_wrapped(
    terminal: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal(60)
    path = "/a/path/that/is/longer-than/the/terminal-is/wide/and/that/nobody/could/copy/broken"
    print_facts([("Fact", "word " * 30), ("Path", path)])
    print_words("one " * 40 + "\n\n" + "two " * 3)
    lines, text = printed(capsys)
    assert all(len(line) <= 60 for line in lines if path not in line)
    assert lines[1].startswith("      word") and path in text
    assert "" in lines and lines[-1] == "two two two"


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "four.zarr"),
        ("traces",),
        ("methods",),
        ("methods", "sparq"),
        ("verify", "four.zarr"),
        ("analyze", "four.zarr", "--method", "window", "--topk", "4", "--no-plots"),
        (
            "recommend",
            "four.zarr",
            "--target",
            "error_norm=0.8",
            "--method",
            "exact",
            "--topk",
            "8",
        ),
    ],
)
def test_commands_fit_eighty_columns(
    run: Run,
    new_trace: Callable[..., None],
    terminal: Callable[[int], None],
    arguments: tuple[str, ...],
) -> None:
    new_trace(Path("four.zarr"), sequences=4)
    terminal(80)
    lines = run(*arguments).stdout.splitlines()
    assert lines and max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
