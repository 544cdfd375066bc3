"""One process at a time writes a trace, a results folder or a file."""

import contextlib
import errno
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import FileLock, Timeout

from retrace.traces.errors import RetraceError
from retrace.traces.location import Location

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("retrace")

LOCK = ".lock"
"""The lock's file, in a results folder."""
_NO_LEAVE = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(path: Location, who: str = "Another capture") -> Iterator[None]:
    """Keep others from what is written at `path`, on a local disk: by a lock of the operating
    system on a file beside it, which ends with the process however that ends.

    Network file systems keep such locks as they are mounted. Object stores have none: there each
    sequence is written whole, by whoever writes it.

    Args:
        path: what is written.
        who: has it then, in the words of the refusal.

    Raises:
        RetraceError: another process has it, or nothing can be written there.
    """
    if not isinstance(path, Path):
        yield
        return
    with _held(path.absolute().parent, f".{path.name}.lock", path, who) as refusal:
        if refusal is not None:
            raise refusal
        yield


@contextlib.contextmanager
def locked_file(file: Path | None) -> Iterator[None]:
    """Keep others from a file that will be written whole, if one is named.

    Raises:
        RetraceError: another process writes it, or none can be there.
    """
    if file is None:
        yield
        return
    if file.is_dir():
        raise RetraceError(f"{file} is a folder: name a file with --out.")
    with locked(file, "Another run"):
        check_leave(file.absolute().parent)
        check_files(file.parent, [file.name])
        yield


@contextlib.contextmanager
def locked_folder(folder: Path, *, shared: bool = False) -> Iterator[RetraceError | None]:
    """Keep others from a results folder, which is there meanwhile, and afterwards if something was
    written.

    Where there is no leave to write, this gives the error to be raised by who has to: what is
    there can be read all the same.

    Args:
        folder: which.
        shared: whether several write it at a time, each files of its own: nobody is kept out.

    Raises:
        RetraceError: another process writes it, or it can't be a folder.
    """
    with _held(folder, None if shared else LOCK, folder, "Another run") as refusal:
        yield refusal


def one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """A function that writes the folder `out`, if that is given, which nobody else writes
    meanwhile. Before it does so, it asks `check_leave`."""
    arguments = inspect.signature(function)

    @functools.wraps(function)
    def locking(*args: P.args, **kwargs: P.kwargs) -> T:
        out = arguments.bind_partial(*args, **kwargs).arguments.get("out")
        if not isinstance(out, str | Path):
            return function(*args, **kwargs)
        with locked_folder(Path(out)):
            return function(*args, **kwargs)

    return locking


def check_leave(folder: Path | None) -> None:
    """Refuse a folder that nothing can be written in, before there is something to write.

    Raises:
        RetraceError: there is no leave to write.
    """
    if folder is not None and not os.access(folder, os.W_OK):
        raise _refusal(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def check_files(folder: Path | None, names: Iterable[str]) -> None:
    """Refuse a folder where something stands that a file can't take the place of, before there is
    one to write: a folder, or a device, which nobody means to replace.

    Raises:
        RetraceError: what is there under one of these names is no file.
    """
    for place in () if folder is None else (folder / name for name in names):
        if place.exists() and not place.is_file():
            raise RetraceError(f"{place} is no file: remove it, or name another place with --out.")


@contextlib.contextmanager
def _held(folder: Path, name: str | None, path: Path, who: str) -> Iterator[RetraceError | None]:
    """Hold the lock of a name in a folder, if it has one, while `path` is written."""
    file = folder / (name or LOCK)
    lock = FileLock(file, timeout=0)
    begun, refusal = False, None
    try:
        begun = not os.path.exists(folder)  # which raises nothing
        folder.mkdir(parents=True, exist_ok=True)
        if name is not None:
            lock.acquire()
    except Timeout:
        raise RetraceError(
            f"{who} is writing {path}: wait for it, or name another place with --out."
        ) from None
    except NotImplementedError:
        _warn(path)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            _warn(path)
        else:
            refusal = _refusal(folder, error)
            if error.errno not in _NO_LEAVE:
                raise refusal from error
    try:
        yield refusal
    finally:
        if lock.is_locked:
            # While it is held: who waits for it sees that the file is gone, and makes its own.
            with contextlib.suppress(OSError):  # of a network file system that went away
                file.unlink(missing_ok=True)
            lock.release()
        if begun:
            with contextlib.suppress(OSError):  # something was written
                folder.rmdir()


def _refusal(folder: Path, error: OSError) -> RetraceError:
    """Why nothing can be written in a folder."""
    cause = error.strerror or str(error)
    if os.path.islink(folder) and not os.path.exists(folder):
        cause = "it is a link to what is not there"
    elif isinstance(error, FileExistsError | NotADirectoryError):
        cause = "it is a file, or below one"
    return RetraceError(f"{folder} cannot be written ({cause}): name another place with --out.")


def _warn(path: Path) -> None:
    log.warning("%s has no locks: see to it that nothing else writes there.", path)
