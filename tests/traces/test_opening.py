"""What is no trace, or one of a later time, is refused with a reason."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zarr

from retrace.traces import RetraceError, find_traces, open_trace

WriteTrace = Callable[..., Path]


def change_attributes(path: Path, **changes: object) -> None:
    """Set attributes of the root group."""
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"].update(changes)
    (path / "zarr.json").write_text(json.dumps(metadata))


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(RetraceError, match="There is no trace at"):
        open_trace(tmp_path / "nothing.zarr")


def test_no_zarr_group(tmp_path: Path) -> None:
    (tmp_path / "t.zarr").mkdir()
    with pytest.raises(RetraceError, match="not a trace"):
        open_trace(tmp_path / "t.zarr")
    (tmp_path / "file.zarr").write_text("text")
    with pytest.raises(RetraceError, match="not a trace"):
        open_trace(tmp_path / "file.zarr")


def test_another_zarr_group(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "t.zarr", mode="w")
    with pytest.raises(RetraceError, match="no 'retrace_format'"):
        open_trace(tmp_path / "t.zarr")


def test_corrupt_metadata(write_trace: WriteTrace) -> None:
    path = write_trace()
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_')
    with pytest.raises(RetraceError, match=r"metadata is damaged \(zarr.json is no JSON"):
        open_trace(path)


def test_newer_format(write_trace: WriteTrace) -> None:
    path = write_trace()
    change_attributes(path, retrace_format=3)
    with pytest.raises(RetraceError, match=r"format 3.*up to 2.*pip install -U"):
        open_trace(path)


def test_unknown_dtype(write_trace: WriteTrace) -> None:
    path = write_trace()
    change_attributes(path, dtype="float8")
    with pytest.raises(RetraceError, match="unknown dtype 'float8'"):
        open_trace(path)


def test_a_layer_that_is_not_there(write_trace: WriteTrace) -> None:
    with pytest.raises(RetraceError, match="no layer 1; it has 0, 3"):
        open_trace(write_trace()).layer(1)


def test_found_newest_last(write_trace: WriteTrace, tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    names = ["traces/b", "c", "a"]
    for age, name in enumerate(names):
        path = write_trace(name)
        for file in path.rglob("*"):
            os.utime(file, (1e9 + age, 1e9 + age))
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    (tmp_path / "broken.zarr").mkdir()
    assert find_traces(tmp_path) == [tmp_path / f"{name}.zarr" for name in names]
    assert find_traces(tmp_path / "nowhere") == []
