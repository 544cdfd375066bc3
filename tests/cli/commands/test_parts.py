"""`retrace analyze --part` and `--workers`, and `retrace merge`."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from retrace.analyze import Results

Run = Callable[..., Result]
OPTIONS = (
    "--method",
    "exact",
    "--method",
    "quest:page=4",
    "--topk",
    "2,5",
    "--no-plots",
    "--no-cache",
)


def test_parts_come_to_what_one_run_does(run: Run, trace: Path) -> None:
    run("analyze", trace, *OPTIONS, "--out", "whole", "--workers", "1")
    for i in (1, 2, 3):
        result = run("analyze", trace, *OPTIONS, "--out", "parts", "--part", f"{i}/3")
        assert f"Part {i} of 3 is in parts" in result.stderr
        assert not result.stdout
    result = run("merge", "parts")
    assert result.stdout == "parts\n"
    assert Path("parts/plots").is_dir()
    for name in (
        "metrics.parquet",
        "curves.parquet",
        "positions.parquet",
        "tails.parquet",
        "projected.parquet",
        "table.md",
    ):
        assert (Path("parts") / name).read_bytes() == (Path("whole") / name).read_bytes()
    assert not Path("parts/.parts").exists()
    assert Results.load("parts").run["missing"] == []


def test_missing_parts_are_named(run: Run, trace: Path) -> None:
    run("analyze", trace, *OPTIONS, "--out", "parts", "--part", "1/3")
    result = run("merge", "parts", code=2)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    places = "(layer 0,2 of sequence 1; layer 1,2 of sequence 0)"
    assert f"4 of 6 parts are missing {places}" in line
    run("analyze", trace, *OPTIONS, "--out", "parts", "--part", "2/3")
    run("analyze", trace, *OPTIONS, "--out", "other", "--part", "3/3")
    run("merge", "parts", code=2)
    run("merge", "parts", "other", "--no-plots")


def test_the_same_command_without_a_part_goes_on(run: Run, trace: Path) -> None:
    run("analyze", trace, *OPTIONS, "--out", "r", "--part", "1/2")
    run("analyze", trace, *OPTIONS, "--out", "r")
    assert not Path("r/.parts").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("analyze", "traces/tiny.zarr", "--part", "2"), "not of the form 2/8"),
        (("analyze", "traces/tiny.zarr", "--part", "3/2"), "expected 1/2 to 2/2"),
        (("analyze", "traces/tiny.zarr", "--workers", "0"), "not in the range"),
        (("merge", "nothing"), "nothing holds no parts"),
    ],
)
def test_mistakes(run: Run, trace: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in run(*arguments, code=2).stderr
