"""Where traces are: folders of a local disk, or objects under a URL such as s3://bucket/t.zarr."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from retrace.traces.errors import RetraceError, UnreachableError


class RemoteLocation:
    """A place under a URL of any file system that fsspec knows."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return Path(self.name).stem

    def exists(self) -> bool:
        """Whether anything is stored there."""
        with explained(self):
            return bool(self.system().exists(self.path()))

    def remove(self) -> None:
        """Remove everything that is stored there."""
        with explained(self):
            if self.system().exists(self.path()):
                self.system().rm(self.path(), recursive=True)

    def traces(self) -> list["RemoteLocation"]:
        """Everything directly beneath that is named like a trace."""
        with explained(self):
            system = self.system()
            system.invalidate_cache()
            found = system.glob(f"{self.path()}/*.zarr")
            return [RemoteLocation(system.unstrip_protocol(path)) for path in sorted(found)]

    def system(self) -> Any:
        """The fsspec file system, which is told nothing but what its own environment says."""
        import fsspec

        system = fsspec.url_to_fs(self.url, use_listings_cache=False)[0]
        if on_hub(self):
            system.invalidate_cache()  # it keeps listings whatever it is told
        return system

    def missing(self) -> tuple[type[Exception], ...]:
        """What its file system raises of an object that is not there."""
        found: tuple[type[Exception], ...] = (
            FileNotFoundError,
            IsADirectoryError,
            NotADirectoryError,
        )
        if on_hub(self):
            from huggingface_hub.errors import EntryNotFoundError

            found += (EntryNotFoundError,)
        return found

    def path(self) -> str:
        import fsspec

        path: str = fsspec.url_to_fs(self.url)[1]
        return path

    def __str__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteLocation) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)


Location = Path | RemoteLocation


def locate(place: "str | Location") -> Location:
    """A path, or a URL, as what it names.

    >>> locate("s3://bucket/t.zarr").stem
    't'
    """
    if isinstance(place, str) and re.match(r"[A-Za-z][\w+.-]+://", place):
        return RemoteLocation(place)
    return place if isinstance(place, RemoteLocation) else Path(place)


def on_hub(place: Location) -> bool:
    """Whether a place is on the Hugging Face Hub."""
    return isinstance(place, RemoteLocation) and place.url.startswith("hf://")


def beside(place: Location, kind: str) -> Path | None:
    """The folder beside a trace on a local disk for what is derived from it; None under a URL.

    >>> beside(Path("traces/t.zarr"), "exact")
    PosixPath('traces/t.exact')
    """
    return place.with_name(f"{place.stem}.{kind}") if isinstance(place, Path) else None


def open_store(place: Location, *, read_only: bool) -> Store:
    """The Zarr store at a place."""
    if isinstance(place, Path):
        return LocalStore(place, read_only=read_only)
    with explained(place):
        return FsspecStore.from_url(
            place.url, read_only=read_only, allowed_exceptions=place.missing()
        )


@contextmanager
def explained(place: Location) -> Iterator[None]:
    """What goes wrong with a remote store, in one line; local ones speak for themselves."""
    try:
        yield
    except RetraceError:
        raise
    except Exception as error:  # each file system and each of their libraries has its own
        if isinstance(place, Path):
            raise
        if isinstance(error, ImportError):
            raise RetraceError(
                f"{place} needs a package that is not installed: for s3:// "
                "`pip install 'retrace-attention[remote]'`, for others the one of fsspec."
            ) from error
        words = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        check = (
            "that the repository is there, and that `hf auth login` or HF_TOKEN names a token that "
            "may read it, and write to it where a trace is written"
            if on_hub(place)
            else "the URL, and the credentials and endpoint in the environment (for s3:// "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)"
        )
        raise UnreachableError(f"{place} cannot be reached ({words}): check {check}.") from error
