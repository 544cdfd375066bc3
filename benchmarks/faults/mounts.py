"""File systems that are small or take nothing, for who may mount them."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[bool]:
    """A file system of `size` bytes at a place; False where none can be mounted."""
    place.mkdir(exist_ok=True)
    with _mounted(place, ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]) as there:
        yield there


def enlarge(place: Path, size: int) -> None:
    """Make room on a small disk."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


@contextlib.contextmanager
def read_only(folder: Path, place: Path) -> Iterator[bool]:
    """What a folder holds, at another place where nothing can be written."""
    place.mkdir(exist_ok=True)
    with _mounted(place, ["--bind", str(folder)]) as there:
        if there:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        yield there


@contextlib.contextmanager
def _mounted(place: Path, arguments: list[str]) -> Iterator[bool]:
    command = ["mount", *arguments, str(place)]
    there = bool(shutil.which("mount")) and not subprocess.run(command).returncode
    try:
        yield there
    finally:
        if there:
            subprocess.run(["umount", str(place)], check=True)
