"""What a capture noted is read as what it must be, or refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from retrace.traces import RetraceError, Trace, noted
from retrace.traces.storage.arrays import Stored
from retrace.traces.storage.objects import open_objects

HELD = {
    "batch_size": 4,
    "flag": True,
    "capture": {"queries": "all", "layers": None, "dense": [0, 2], "mixed": [0, "x"]},
    "task": [{"task": "text"}],
}


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    """One of which only the attributes are asked for."""
    return Trace(tmp_path, Stored(str(tmp_path), open_objects(tmp_path)), HELD)


@pytest.mark.parametrize(
    ("path", "kind", "value"),
    [
        ("batch_size", int, 4),
        ("flag", bool, True),
        ("capture.queries", str, "all"),
        ("capture.layers", list[int] | None, None),
        ("capture.dense", list[int] | None, [0, 2]),
        ("task", list[dict[str, Any]], [{"task": "text"}]),
    ],
)
def test_what_is_there(trace: Trace, path: str, kind: Any, value: Any) -> None:
    assert noted(trace, path, kind) == value


@pytest.mark.parametrize("path", ["nothing", "capture.nothing", "batch_size.deeper", "task.0"])
def test_what_is_not(trace: Trace, path: str) -> None:
    with pytest.raises(RetraceError, match=f"has no attribute {path}, which `retrace capture`"):
        noted(trace, path, int)


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("batch_size", str, "is '4'; expected str"),
        ("flag", int, "is 'True'; expected int"),
        ("capture.layers", int, "is 'None'; expected int"),
        ("capture.mixed", list[int], r"expected list\[int\]"),
        ("task", list[int] | None, r"expected list\[int\] \| None"),
    ],
)
def test_what_is_something_else(trace: Trace, path: str, kind: Any, words: str) -> None:
    with pytest.raises(RetraceError, match=f"its attribute {path} .*{words}"):
        noted(trace, path, kind)
