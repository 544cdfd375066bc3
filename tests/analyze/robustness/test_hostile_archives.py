"""What is kept for later runs is data that anybody may have changed: read as it was, or not."""

import io
import os
import socket
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrace.analyze.storage import npz
from retrace.analyze.storage.npz import read_arrays, write_arrays

ARRAYS = {
    "0.at_all.recall": np.arange(12.0).reshape(3, 2, 2),
    "ids": np.arange(6, dtype=np.uint16).reshape(2, 3),
    "facts": np.frombuffer(b'{"costs": []}', np.uint8),
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole one."""
    path = tmp_path_factory.mktemp("kept") / "0.npz"
    write_arrays(path, ARRAYS)
    return path


def test_as_it_was(archive: Path) -> None:
    found = read_arrays(archive)
    assert found is not None and found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert [file.name for file in archive.parent.iterdir()] == ["0.npz"]


@settings(max_examples=400)
@given(data=st.data())
def test_bytes_that_were_changed(archive: Path, data: st.DataObject) -> None:
    held = bytearray(archive.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(held) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "put", "drop"]))
        if how == "flip":
            held[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            held = held[: max(at, 1)]
        elif how == "put":
            held[at:at] = data.draw(st.binary(min_size=1, max_size=30))
        else:
            del held[at : at + 1]
        held = held or bytearray(1)
    changed = archive.with_name("changed.npz")
    changed.write_bytes(held)
    for name, array in (read_arrays(changed) or {}).items():
        # Names have no checksum, and shapes may be any of as many numbers: all else has.
        if name in ARRAYS and array.shape == ARRAYS[name].shape:
            np.testing.assert_array_equal(array, ARRAYS[name])
    changed.unlink()


def header(text: str, data: bytes = b"\0" * 8) -> bytes:
    """An array of version 1.0 whose header is this."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (0, 1000000000000000)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': 1}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f1', 'fortran_order': False, 'shape': (8,)}",
        "__import__('os').system('false')",
        "{}",
        "(" * 9000,
        "-" * 9000 + "1",
    ],
)
def test_headers_that_claim_or_run_something(tmp_path: Path, text: str) -> None:
    with zipfile.ZipFile(tmp_path / "h.npz", "w") as archive:
        archive.writestr("a.npy", header(text))
    assert read_arrays(tmp_path / "h.npz") is None


def test_what_unpacks_to_more(tmp_path: Path) -> None:
    raw = io.BytesIO()
    np.save(raw, np.zeros(1 << 20))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", raw.getvalue())
    assert read_arrays(tmp_path / "bomb.npz") is None


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")  # which would be waited for
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "zero", "none"):
        assert read_arrays(tmp_path / f"{name}.npz") is None


def test_what_cannot_be_written_leaves_nothing(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = archive.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        write_arrays(archive, {"a": np.zeros(3)})
    assert archive.read_bytes() == before
    assert [file.name for file in archive.parent.iterdir()] == ["0.npz"]


def test_two_hosts_with_processes_of_one_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One begins to write what the other is at: both come to an end."""
    put = npz.put_arrays

    def both(file: Any, arrays: Any) -> None:
        put(file, arrays)
        if socket.gethostname() != "second":
            monkeypatch.setattr(socket, "gethostname", lambda: "second")
            write_arrays(tmp_path / "0.npz", {"a": np.ones(2)})

    monkeypatch.setattr(npz, "put_arrays", both)
    write_arrays(tmp_path / "0.npz", {"a": np.zeros(2)})
    found = read_arrays(tmp_path / "0.npz")
    assert found is not None and found["a"].tolist() == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["0.npz"]
