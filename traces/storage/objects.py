"""The stored objects of a trace, read as what they are: files that anybody may have written.

No more is read than is there, and nothing outside the trace's own folder.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from retrace.traces.location import Location, RemoteLocation, explained

Range = tuple[int, int]
"""The first byte, and the one after the last."""


class Objects(Protocol):
    """What is stored beneath a place, by keys such as `layers/0/key/zarr.json`."""

    def size(self, key: str) -> int | None:
        """Bytes of an object; None where there is none."""

    def first_bytes(self, keys: Sequence[str], most: int) -> list[bytes | None]:
        """The first `most` bytes of each object, or all that it has; None where there is none."""

    def ranges(self, key: str, wanted: Sequence[Range]) -> Iterator[bytes | memoryview]:
        """Parts of an object that is there, one after another; short where it ends earlier."""

    def children(self, key: str) -> list[str]:
        """Names of what is directly beneath a key."""


def open_objects(place: Location) -> Objects:
    """The objects at a place."""
    return _Remote(place) if isinstance(place, RemoteLocation) else _Folder(place)


def inside(root: Path, key: str) -> Path:
    """The path of an object, which no symbolic link may lead out of the folder `root`."""
    path = root / key
    whole, real = os.path.realpath(root), os.path.realpath(path)
    if not f"{real}{os.sep}".startswith(f"{whole}{os.sep}"):
        raise PermissionError(errno.EPERM, f"{key} leads out of the trace, to {real}")
    return path


class _Folder:
    """Files of a local folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def size(self, key: str) -> int | None:
        try:
            known = inside(self._root, key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(known.st_mode):  # a pipe would be waited for, a device never ends
            raise OSError(errno.EINVAL, "it is no regular file")
        return known.st_size

    def first_bytes(self, keys: Sequence[str], most: int) -> list[bytes | None]:
        return [self._first_bytes(key, most) for key in keys]

    def _first_bytes(self, key: str, most: int) -> bytes | None:
        size = self.size(key)
        if size is None:
            return None
        with (self._root / key).open("rb") as file:
            return file.read(min(size, most))

    def ranges(self, key: str, wanted: Sequence[Range]) -> Iterator[bytes | memoryview]:
        with (self._root / key).open("rb") as file:
            for start, stop in wanted:
                file.seek(start)
                yield file.read(stop - start)

    def children(self, key: str) -> list[str]:
        try:
            return os.listdir(inside(self._root, key))
        except (FileNotFoundError, NotADirectoryError):
            return []


class _Remote:
    """Objects under a URL. What goes wrong there is told in one line."""

    def __init__(self, place: RemoteLocation) -> None:
        self._place = place

    def size(self, key: str) -> int | None:
        with explained(self._place):
            try:
                size: int | None = self._place.system().size(self._path(key))
            except self._place.missing():
                return None
            return size

    def first_bytes(self, keys: Sequence[str], most: int) -> list[bytes | None]:
        paths = [self._path(key) for key in keys]
        with explained(self._place):
            read = self._place.system().cat_ranges(
                paths, [0] * len(paths), [most] * len(paths), on_error="return"
            )
            return [self._unless_missing(one) for one in read]

    def ranges(self, key: str, wanted: Sequence[Range]) -> Iterator[bytes | memoryview]:
        if not wanted:
            return
        with explained(self._place):
            system, path, first = self._place.system(), self._path(key), wanted[0][0]
            if all(one[1] == other[0] for one, other in pairwise(wanted)):  # as retrace writes
                whole = memoryview(system.cat_file(path, start=first, end=wanted[-1][1]))
                parts = [whole[start - first : stop - first] for start, stop in wanted]
            else:
                starts, stops = [one[0] for one in wanted], [one[1] for one in wanted]
                parts = system.cat_ranges([path] * len(wanted), starts, stops, on_error="raise")
        yield from parts

    def children(self, key: str) -> list[str]:
        with explained(self._place):
            try:
                found = self._place.system().ls(self._path(key), detail=False)
            except self._place.missing():
                return []
            return [path.rstrip("/").rpartition("/")[2] for path in found]

    def _path(self, key: str) -> str:
        return f"{self._place.path()}/{key}".rstrip("/")

    def _unless_missing(self, read: bytes | Exception) -> bytes | None:
        if isinstance(read, self._place.missing()):
            return None
        if isinstance(read, Exception):
            raise read
        return read
