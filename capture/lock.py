"""One capture at a time writes a trace."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from retrace.traces import Location, RetraceError

log = logging.getLogger("retrace")


@contextlib.contextmanager
def locked(path: Location) -> Iterator[None]:
    """Keep other captures from the trace at `path`, on a local disk: by a lock of the operating
    system on a file beside it, which ends with the process however that ends.

    Network file systems keep such locks as they are mounted. Object stores have none: there each
    sequence is written whole, by whoever writes it.

    Raises:
        RetraceError: another capture has it, or nothing can be written there.
    """
    if not isinstance(path, Path):
        yield
        return
    folder = path.absolute().parent
    begun = not folder.exists()
    file = folder / f".{path.name}.lock"
    lock = FileLock(file, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RetraceError(
            f"Another capture is writing {path}: wait for it, or name another place with --out."
        ) from None
    except OSError as error:
        raise RetraceError(
            f"{folder} cannot be written ({error.strerror}): name another place with --out."
        ) from error
    except NotImplementedError:
        log.warning("%s has no locks: see to it that nothing else captures there.", folder)
    try:
        yield
    finally:
        # While it is held: who waits for it sees that the file is gone, and makes its own.
        file.unlink(missing_ok=True)
        lock.release()
        if begun:
            with contextlib.suppress(OSError):  # something was written
                folder.rmdir()
