"""Damaged files are noticed, never read as numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrace.traces import RetraceError, open_trace

WriteTrace = Callable[..., Path]


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def only_file(path: Path) -> Path:
    """The one file of a sequence's shard."""
    if path.is_file():
        return path
    (file,) = (p for p in path.rglob("*") if p.is_file())
    return file


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("at", [0, 37, -60, -3])
def test_a_flipped_bit_in_a_tensor(write_trace: WriteTrace, name: str, at: int) -> None:
    path = write_trace()
    flip(only_file(path / f"layers/3/{name}/c/2"), at)
    layer = open_trace(path).layer(3)
    with pytest.raises(RetraceError, match=rf"{name} of layer 3, sequence 2 is damaged"):
        getattr(layer, name)(2)
    getattr(layer, name)(0)


@pytest.mark.parametrize("kept", [0, 1, 40, 0.5, -1])
def test_a_tensor_cut_short(write_trace: WriteTrace, kept: float) -> None:
    path = write_trace()
    file = only_file(path / "layers/0/key/c/0")
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(RetraceError, match="key of layer 0, sequence 0 is damaged"):
        open_trace(path).layer(0).key(0)


@pytest.mark.parametrize("name", ["done", "length", "query_positions"])
def test_a_flipped_bit_in_the_plan(write_trace: WriteTrace, name: str) -> None:
    path = write_trace()
    flip(only_file(path / f"{name}/c/2"), 1)
    trace = open_trace(path)
    with pytest.raises(RetraceError, match=rf"{name} of sequence 2 is damaged"):
        assert trace.sequences and trace.length(2) and len(trace.query_positions(2))


@pytest.mark.parametrize("name", ["tokens", "nll"])
def test_a_flipped_bit_in_a_sequence(write_trace: WriteTrace, name: str) -> None:
    path = write_trace()
    flip(only_file(path / f"{name}/c/2"), 1)
    trace = open_trace(path)
    read: Callable[[int], Any] = getattr(trace, name)
    with pytest.raises(RetraceError, match=rf"{name}.*damaged"):
        read(2)
