"""Files are written whole, and nowhere else than said."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrace.traces import RetraceError, create_trace
from retrace.traces.storage.durable import remove_all, this_process, written_whole
from retrace.traces.storage.lock import locked_file, locked_folder
from retrace.traces.storage.regular import open_regular


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "hard link"])
def test_what_lies_aside_is_not_written_to(tmp_path: Path, kind: str) -> None:
    victim, aside = tmp_path / "victim", tmp_path / "x.json.partial"
    victim.write_text("mine")
    if kind == "link":
        aside.symlink_to(victim)
    elif kind == "dangling link":
        aside.symlink_to(tmp_path / "new")
    elif kind == "hard link":
        aside.hardlink_to(victim)
    else:
        aside.write_text("of a run that was killed")
    with written_whole(tmp_path / "x.json") as file:
        file.write(b"ours")
    assert victim.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["victim", "x.json"]
    assert (tmp_path / "x.json").read_bytes() == b"ours"


@pytest.mark.parametrize("failing", ["replace", "fsync", "write"])
def test_nothing_is_left_of_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    if failing == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    elif failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Stale"), written_whole(tmp_path / "x") as file:
        file.write(b"ours")
        if failing == "write":
            fail()
    assert list(tmp_path.iterdir()) == []


def test_two_hosts_that_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared folder, by processes of one number: each writes its own, and the last counts."""
    with written_whole(tmp_path / "x", this_process()) as ours:
        ours.write(b"ou")
        with monkeypatch.context() as patch:
            patch.setattr(socket, "gethostname", lambda: "other")
            with written_whole(tmp_path / "x", this_process()) as theirs:
                theirs.write(b"theirs")
        assert (tmp_path / "x").read_bytes() == b"theirs"
        ours.write(b"rs")
    assert (tmp_path / "x").read_bytes() == b"ours"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_process_left_is_overwritten_by_itself(tmp_path: Path) -> None:
    (tmp_path / f"x.{this_process()}.partial").write_text("cut")
    with written_whole(tmp_path / "x", this_process()) as file:
        file.write(b"ours")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_links_are_removed_and_not_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    remove_all(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert (tmp_path / "other" / "mine").exists()
    remove_all(tmp_path / "other")
    remove_all(tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []


def test_pipes_and_folders_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="is no regular file"):
            open_regular(place)


def test_places_of_files_are_refused_ahead(tmp_path: Path) -> None:
    with pytest.raises(RetraceError, match="is a folder: name a file"), locked_file(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "out.json"
    with pytest.raises(RetraceError, match="cannot be written"), locked_file(below):
        pass
    with locked_file(tmp_path / "out.json"):
        with (
            pytest.raises(RetraceError, match="Another run is writing"),
            locked_file(tmp_path / "out.json"),
        ):
            pass
        with locked_folder(tmp_path / "r"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_finished_sequence_outlives_a_power_cut(
    make_plan: Callable[..., Any], tmp_path: Path, flushed: list[Path]
) -> None:
    """Each new file is flushed before the folder that names it, and all before the mark."""
    plan, path = make_plan(), tmp_path / "t.zarr"
    writer = create_trace(path, **plan.arguments)
    before = set(path.rglob("*"))
    flushed.clear()
    plan.fill(writer, [1])
    new = set(path.rglob("*")) - before
    last = {place: turn for turn, place in enumerate(flushed)}
    for file in (place for place in new if place.is_file()):
        assert last[file.with_name(f"{file.name}.partial")] < last[file.parent]
    for folder in (place for place in new if place.is_dir()):
        assert folder.parent in last
    assert flushed[-2:] == [path / "done" / "c" / "1.partial", path / "done" / "c"]
    files = sum(place.is_file() for place in new)
    assert len(flushed) == 2 * files + (len(new) - files), "each once"
