"""Files that are there whole and for good, or not at all."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from retrace.traces.errors import RetraceError


@contextmanager
def written_whole(path: Path, writer: str = "", *, flush: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which takes its place when the block ends without an error. What was there
    before stays until then; the new one, once there, outlives a power cut.

    Args:
        path: the file's place, in a folder that is there.
        writer: tells apart those who may write it at a time, as `this_process` does. What a killed
            one left beside it is overwritten by the next of the same name.
        flush: False for what is checked when it is read, and made again where it is damaged: it
            may be so after a power cut, and waits for no disk.
    """
    aside = path.with_name(f"{path.name}{writer and '.'}{writer}.partial")
    # Anew, and by nobody's link: another name of some file is no place to write to.
    aside.unlink(missing_ok=True)
    opened = os.open(
        aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
    )
    try:
        with os.fdopen(opened, "wb") as file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if flush:
        sync_path(path.parent)


def this_process() -> str:
    """Names this process among all that write to a folder, of this host and of others, of which
    those of two containers may have the same number."""
    try:
        namespace = f".{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        namespace = ""
    return f"{socket.gethostname()}{namespace}.{os.getpid()}"


def within(folder: Path, name: str) -> Path:
    """The place of a folder in another one that is written or cleared: no link, by which files
    would be written or removed that are elsewhere.

    Raises:
        RetraceError: what is there is a link, or no folder.
    """
    path = folder / name
    if path.is_symlink():
        raise RetraceError(f"{path} is a link, which may lead to files of others: remove it.")
    if path.exists() and not path.is_dir():
        raise RetraceError(f"{path} is no folder: remove it, or name another place with --out.")
    return path


def remove_all(path: Path) -> None:
    """Remove a folder with all that is in it, or a file or link of its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """A folder, and those above it, there for good."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Flush a file to the disk, or the names that a folder holds."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_all(path: Path) -> None:
    """Flush everything in a folder to the disk, whoever wrote it."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync_path(Path(folder, name))
        sync_path(Path(folder))
