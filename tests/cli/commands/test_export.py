"""`retrace export`."""

from collections.abc import Callable
from pathlib import Path

from click.testing import Result

Run = Callable[..., Result]


def test_files_are_named_on_stdout(run: Run, trace: Path) -> None:
    result = run("export", trace, "--out", "v", "--format", "numpy", "--layers", "0")
    files = [Path(line) for line in result.stdout.splitlines()]
    assert files and all((file / "neighbors.npy").exists() for file in files)
    assert f"({len(files)} set" in result.stderr


def test_mistakes(run: Run, trace: Path) -> None:
    result = run("export", trace, "--layers", "0", "--kv-heads", "99", code=2)
    assert "none is 99" in result.stderr
    result = run("export", trace, code=2)
    assert "Layer 2 has a window or chunks" in result.stderr and "--layers 0,1" in result.stderr
    assert "--format" in run("export", trace, "--format", "csv", code=2).stderr
