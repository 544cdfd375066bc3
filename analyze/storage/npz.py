"""Archives of arrays (.npz) that are kept for later runs: written whole, read without trust."""

import ast
import math
import os
import re
import stat
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
import numpy.typing as npt

from retrace.traces.storage.durable import make_folder, this_process, written_whole

Arrays = dict[str, npt.NDArray[Any]]

DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    MemoryError,
    BadZipFile,
    struct.error,
    SyntaxError,
    RuntimeError,
)
"""What comes of reading what `write_arrays` did not write: of zipfile for archives that are cut
short, encrypted or of a newer kind, and of headers that are none."""
READ_BYTES = 1 << 24
"""Bytes read at once."""
MAGIC = b"\x93NUMPY\x01\x00"
"""What an array begins with, in version 1.0 of its format."""
DTYPE = r"[<|][biuf][1248]"
"""Numbers; never objects, which would be unpickled."""


def read_arrays(path: Path, names: Collection[str] | None = None) -> Arrays | None:
    """The arrays of an archive, or those of these names, by name; None if it is not there, or is
    damaged.

    They take no more memory than the file has bytes, and nothing of it is run.
    """
    try:
        size = os.stat(path)
        if not stat.S_ISREG(size.st_mode):  # a pipe would be waited for, a device never ends
            return None
        with path.open("rb") as file:
            return arrays_in(file, size.st_size, names)
    except DAMAGED:
        return None


def arrays_in(file: IO[bytes], size: int, names: Collection[str] | None = None) -> Arrays | None:
    """The same of an open file of so many bytes."""
    try:
        with ZipFile(file) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > size:
                return None
            return {
                name: _array(archive, entry)
                for entry in entries
                for name in (entry.filename.removesuffix(".npy"),)
                if names is None or name in names
            }
    except DAMAGED:
        return None


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], *, flush: bool = True) -> None:
    """Write an archive that is there whole and for good, or not at all; without `flush` a power cut
    may damage it, and `read_arrays` gives None then."""
    if flush:
        make_folder(path.parent)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, writer=this_process(), flush=flush) as file:
        put_arrays(file, arrays)


def put_arrays(file: IO[bytes], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write an archive into an open file."""
    np.savez(file, allow_pickle=False, **arrays)


def _array(archive: ZipFile, entry: ZipInfo) -> npt.NDArray[Any]:
    if entry.compress_type != ZIP_STORED:
        raise BadZipFile("it is compressed: how large it is nobody knows")
    with archive.open(entry) as member:
        shape, fortran, dtype = _header(member)
        if math.prod(shape) * dtype.itemsize != entry.file_size - member.tell():
            raise ValueError("it has another size than its shape")
        data = bytearray()
        while read := member.read(READ_BYTES):  # compares the checksum at the end
            data += read
    array = np.frombuffer(data, dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the first axis runs fastest, and dtype."""
    if member.read(len(MAGIC)) != MAGIC:
        raise ValueError("it is no array")
    (length,) = struct.unpack("<H", member.read(2))
    header = ast.literal_eval(member.read(length).decode("latin1"))
    shape, dtype = header["shape"], header["descr"]
    if not all(type(n) is int and n >= 0 for n in shape) or not re.fullmatch(DTYPE, dtype):
        raise ValueError("it holds no numbers")
    return tuple(shape), bool(header["fortran_order"]), np.dtype(dtype)
