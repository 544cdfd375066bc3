"""Where a trace is written, and what happens to one that is there already."""

import contextlib
import errno
import shutil

from retrace.traces.errors import RetraceError
from retrace.traces.location import Location, RemoteLocation
from retrace.traces.reader import half_begun, open_trace
from retrace.traces.storage.durable import remove_all, within


class Output:
    """The place of a trace: refuses what stands in the way before any work is done.

    With `overwrite` the new trace is written aside, and takes the place of the old one when it is
    complete. With `resume` an interrupted one goes on, be it aside or in place. Under a URL nothing
    can be renamed: there the old trace is removed when the new one begins.
    """

    path: Location
    writing: Location
    """Where the trace is written."""
    resumes: bool
    """Whether there is an interrupted trace to go on with."""

    def __init__(self, path: Location, *, overwrite: bool, resume: bool) -> None:
        self.path = path
        if isinstance(path, RemoteLocation):
            self.writing = path
            there = path.exists() and not half_begun(path)
            if there and not (overwrite or resume):
                raise _exists(path)
            if there:
                open_trace(path)  # refuses to replace or go on with what is not a trace
            self.resumes = resume and there
            return
        # No names that end in .zarr: these are nothing that a listing of traces should show.
        self._aside = path.with_name(f".{path.name}.replacement")
        self._retired = path.with_name(f".{path.name}.replaced")
        for own in (self._aside, self._retired):
            within(own.parent, own.name)  # by a link, another trace would be taken for it
        if self._retired.exists() and not path.exists():
            self._retired.rename(path)  # killed between the two renames of `complete`
        if path.is_symlink() and not path.exists():
            raise RetraceError(
                f"{path} is a link to what is not there: remove it, or name another place with "
                "--out."
            )
        if path.exists() and not (overwrite or resume):
            raise _exists(path)
        if path.exists() and overwrite:
            open_trace(path)  # refuses to replace what is not a trace
        replaces = path.exists() and (overwrite or self._aside.exists())
        self.writing = self._aside if replaces else path
        self.resumes = resume and self.writing.exists()

    @classmethod
    def joined(cls, path: Location, writing: Location) -> "Output":
        """The output of a process that helps another one, which has looked at what is there."""
        output = cls.__new__(cls)
        output.path, output.writing, output.resumes = path, writing, True
        return output

    def clear(self) -> None:
        """Remove what an earlier capture left aside, before a new trace is begun."""
        if isinstance(self.path, RemoteLocation):
            self.path.remove()
        else:
            shutil.rmtree(self._aside, ignore_errors=True)

    def discard(self) -> None:
        """Remove the trace that was begun, which nothing was recorded in."""
        if isinstance(self.writing, RemoteLocation):
            self.writing.remove()
        else:
            shutil.rmtree(self.writing, ignore_errors=True)

    def check_space(self, needed: int) -> None:
        """Refuse a trace of `needed` bytes that the disk has no room for."""
        if isinstance(self.path, RemoteLocation):
            return
        folder = self.path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise RetraceError(
                f"The trace takes {_gigabytes(needed)} and {folder} has {_gigabytes(free)} free: "
                "take fewer layers, queries or sequences, or choose another place."
            )

    def complete(self) -> None:
        """Put the finished trace in its place."""
        if isinstance(self.path, RemoteLocation) or isinstance(self.writing, RemoteLocation):
            return
        if self.writing != self.path:
            remove_all(self._retired)
            self.path.rename(self._retired)
            self.writing.rename(self.path)
        with contextlib.suppress(OSError):  # the new one is there, whatever is left of the old
            remove_all(self._retired)

    def explain(self, error: OSError) -> RetraceError | None:
        """What a disk that takes no more in the middle of a capture means, and how to go on; None
        for what is no matter of the trace's place."""
        cause = _CAUSES.get(error.errno or 0)
        if isinstance(self.path, RemoteLocation) or cause is None:
            return None
        there = str(error.filename or "").startswith(str(self.path.parent))
        if error.errno in _PERMISSION and not there:
            return None
        return RetraceError(
            f"{cause}; what was finished of {self.path} is kept. Make room or leave to write, and "
            "give the same command with --resume (without --overwrite)."
        )


_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_CAUSES = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk is full",
    errno.EFBIG: "The disk takes no file of this size",
    errno.EIO: "The disk fails",
    **dict.fromkeys(_PERMISSION, "The trace cannot be written"),
}


def _exists(path: Location) -> RetraceError:
    return RetraceError(
        f"{path} exists: go on with it by --resume, replace it by --overwrite, or name another "
        "place."
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"
