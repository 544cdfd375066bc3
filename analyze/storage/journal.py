"""A journal: what tasks come to, appended to one file, so that many small ones share a flush.

Each record is a header and an archive of arrays (.npz) of a layer and sequence, with a checksum of
both. A process that is killed loses the record that it was at, and nothing before: what was
appended is the operating system's. A flush guards against a power cut, and takes as long as a small
task.
"""

import io
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4
from zlib import crc32

import numpy.typing as npt

from retrace.analyze.storage.npz import Arrays, arrays_in, put_arrays
from retrace.traces.storage.durable import sync_path
from retrace.traces.storage.regular import open_regular

Task = tuple[int, int]
"""A layer and a sequence of a run: what a worker replays at once, with all its heads."""

FLUSH_SECONDS = 1.0
"""Work that a power cut may cost beside the task in hand. What takes longer is flushed each."""
HEADER = struct.Struct("<8sqqQ")
"""Magic number, layer, sequence, bytes of the archive; a checksum comes next."""
CHECKSUM = struct.Struct("<I")
MAGIC = b"retrace\x01"


class Journal:
    """The one file that a process appends to: nobody else does, so none waits for another."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{time.time_ns():020d}.{uuid4().hex}.journal"
        self._pending = False
        self._flushed: float | None = None

    def append(self, task: Task, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add a record; the folder is there."""
        archive = io.BytesIO()
        put_arrays(archive, arrays)
        data = archive.getbuffer()
        header = HEADER.pack(MAGIC, *task, len(data))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self._path, flags, 0o666), "ab") as file:
            file.write(header + CHECKSUM.pack(crc32(data, crc32(header))))
            file.write(data)
        self._pending = True
        if self._flushed is None or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """What was added outlives a power cut from here on."""
        if not self._pending:
            return
        sync_path(self._path)
        if self._flushed is None:
            sync_path(self._path.parent)
        self._pending, self._flushed = False, time.monotonic()


def read_journals(folder: Path) -> Iterator[tuple[Task, Arrays]]:
    """The records of all journals of a folder, the newer ones last. What is damaged is left out,
    and what comes after it where nobody can tell where that begins."""
    for path in sorted(folder.glob("*.journal")):
        yield from _records(path)


def _records(path: Path) -> Iterator[tuple[Task, Arrays]]:
    try:
        with open_regular(path) as file:
            left = os.fstat(file.fileno()).st_size
            while len(header := file.read(HEADER.size)) == HEADER.size:
                magic, layer, sequence, length = HEADER.unpack(header)
                left -= HEADER.size + CHECKSUM.size + length
                if magic != MAGIC or left < 0:
                    return
                checksum, data = file.read(CHECKSUM.size), file.read(length)
                if checksum != CHECKSUM.pack(crc32(data, crc32(header))):
                    continue
                arrays = arrays_in(io.BytesIO(data), length)
                if arrays is not None:
                    yield (layer, sequence), arrays
    except (OSError, ValueError):  # it is gone, or no file
        return
