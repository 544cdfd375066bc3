"""Results that are saved outlive a power cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrace.analyze import analyze
from retrace.traces import Trace


def test_results_are_flushed_before_they_take_their_place(
    make_trace: Callable[..., Trace], rules: Any, tmp_path: Path, flushed: list[Path]
) -> None:
    """Each file once, the folder that they are written into, and twice the one they end in: when
    they are whole beside what was there, and when they stand in its place."""
    results = analyze(make_trace(rules()), ["window"], [2], keep_exact=False)
    flushed.clear()
    folder = tmp_path / "r"
    results.save(folder)
    names = {file.name for file in folder.iterdir()}
    assert {"metrics.parquet", "run.json", "table.md"} <= names
    aside = folder / ".saving"
    whole = flushed.index(aside)
    at = [turn for turn, path in enumerate(flushed) if path.parent == aside]
    assert {flushed[turn].name for turn in at} == names
    assert max(at) < whole
    assert flushed[whole + 1 :] == [folder, folder]
    assert len(flushed) == len(set(flushed)) + flushed.count(folder) - 1
