"""Completion in bash, zsh and fish: commands, methods, and the parameters of specs."""

from collections.abc import Callable

import pytest
from click.testing import Result

Run = Callable[..., Result]
BEFORE_A_METHOD = [
    ["analyze", "--method"],
    ["sweep", "t.zarr", "sweep.yaml", "--method"],
    ["capture", "--approximate"],
    ["recommend", "--method"],
    ["evaluate", "--method"],
    ["calibrate", "t.zarr"],
    ["methods"],
]


def completed(run: Run, shell: str, words: list[str]) -> list[str]:
    """What a shell is given for the last of these words, as its own script asks for it."""
    line = {
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": words[-1] if shell == "fish" else str(len(words) - 1),
        "_RETRACE_COMPLETE": f"{shell}_complete",
    }
    answer = run(env=line).stdout
    if shell == "zsh":  # type, value and help, a line each
        return [value.replace("\\:", ":") for value in answer.splitlines()[1::3]]
    return [value.split(",", 1)[1].split("\t")[0] for value in answer.splitlines() if value]


def in_bash(word: str) -> list[str]:
    """A word as bash breaks it up."""
    return word.replace(":", "\n:\n").replace("=", "\n=\n").strip().split("\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script(run: Run, shell: str) -> None:
    script = run(env={"_RETRACE_COMPLETE": f"{shell}_source"}).stdout
    assert f"_RETRACE_COMPLETE={shell}_complete" in script


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_methods(run: Run, shell: str) -> None:
    assert completed(run, shell, ["retrace", "re"]) == ["recommend", "report"]
    for before in BEFORE_A_METHOD:
        found = completed(run, shell, ["retrace", *before, "hnsw"])
        assert found == ["hnsw", "hnswlib"], before
    assert completed(run, shell, ["retrace", "analyze", "--method", "nothing"]) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("quest:pa", ["quest:page=16"]),
        ("sparq:pool=sum-", ["sparq:pool=sum-softmax"]),
        ("quest:page=8,le", ["quest:page=8,least_pages=3"]),
        ("quest:pool=sum,po", []),
        ("nothing:pa", []),
        ("loki:basis=", ["loki:basis=calibration", "loki:basis=own"]),
    ],
)
def test_parameters(run: Run, shell: str, typed: str, expected: list[str]) -> None:
    words = in_bash(typed) if shell == "bash" else [typed]
    if shell == "bash":  # which replaces what comes after the last break
        kept = 1 + max(typed.rfind(":"), typed.rfind("="))
        expected = [value[kept:] for value in expected]
    assert completed(run, shell, ["retrace", "analyze", "--method", *words]) == expected


def test_help_beside_parameters(run: Run) -> None:
    line = {"COMP_WORDS": "retrace analyze --method window:", "COMP_CWORD": "3"}
    answer = run(env={**line, "_RETRACE_COMPLETE": "zsh_complete"}).stdout
    assert "keep=sink\\:4+recent\\:1\nkeys always attended" in answer


def test_files_of_ones_own(run: Run) -> None:
    line = {"COMP_WORDS": "retrace analyze --method ./mi", "COMP_CWORD": "3"}
    assert run(env={**line, "_RETRACE_COMPLETE": "bash_complete"}).stdout == "file,./mi\n"
