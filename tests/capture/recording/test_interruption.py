"""Existing traces are left alone, replaced only by complete ones, and resumed to the same bytes."""

import errno
import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrace.capture import Progress, capture
from retrace.traces import RetraceError, Trace, TraceWriter, open_trace


@pytest.fixture(params=[1, 2], ids=["shards of one", "shards of two"])
def bundle(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many sequences of 40 positions share a shard."""
    monkeypatch.setattr("retrace.traces.bundles.BUNDLE_POSITIONS", 40 * request.param)
    return int(request.param)


@pytest.fixture
def run(bundle: int, model_folder: Any, text_file: Path, tmp_path: Path) -> Callable[..., Trace]:
    """Captures a small trace at tmp_path/t, with some options changed."""

    def run(**changes: Any) -> Trace:
        options = {"limit": 4, "max_length": 40, "batch_size": 2, "out": tmp_path / "t", **changes}
        return capture(str(model_folder("mistral")), text=[text_file], **options)

    return run


class Stop(Exception):
    """Ends a capture from within."""


def stop_after(sequences: int) -> Callable[[Progress], None]:
    """Ends a capture once so many sequences are finished."""

    def show(progress: Progress) -> None:
        if progress.sequences >= sequences:
            raise Stop

    return show


def contents(folder: Path) -> dict[str, str]:
    """Digest of every chunk and of every array's metadata, by path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent != folder  # the group's attributes hold the time
    }


def test_existing_output_is_refused_and_left_alone(
    run: Callable[..., Trace], tmp_path: Path
) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine").write_text("precious")
    for changes in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(RetraceError, match=r"--overwrite|not a trace|no Zarr group"):
            run(**changes)
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["mine"]
    assert (tmp_path / "t" / "mine").read_text() == "precious"


def test_overwrite_replaces_a_trace_when_complete(
    run: Callable[..., Trace], tmp_path: Path
) -> None:
    run()
    before = contents(tmp_path / "t")
    with pytest.raises(Stop):
        run(overwrite=True, limit=3, progress=stop_after(2))
    assert contents(tmp_path / "t") == before
    with pytest.raises(RetraceError, match="cannot be"):
        run(overwrite=True, max_length=10_000)
    assert contents(tmp_path / "t") == before
    assert run(overwrite=True, limit=3).planned == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".t")]


def test_an_interrupted_replacement_is_resumed(run: Callable[..., Trace], tmp_path: Path) -> None:
    run()
    with pytest.raises(Stop):
        run(overwrite=True, limit=3, progress=stop_after(2))
    assert open_trace(tmp_path / "t").planned == 4
    trace = run(resume=True, limit=3)
    assert (trace.path, trace.planned, trace.sequences) == (tmp_path / "t", 3, (0, 1, 2))


def test_a_swap_that_was_killed_half_way_is_mended(
    run: Callable[..., Trace], tmp_path: Path
) -> None:
    run()
    (tmp_path / "t").rename(tmp_path / ".t.replaced")
    with pytest.raises(RetraceError, match="exists"):
        run()
    assert open_trace(tmp_path / "t").sequences == (0, 1, 2, 3)


def test_resume_goes_on_where_it_stopped(
    run: Callable[..., Trace], bundle: int, tmp_path: Path
) -> None:
    whole = run(out=tmp_path / "whole")
    assert whole.bundle == bundle
    with pytest.raises(Stop):
        run(progress=stop_after(2))
    assert open_trace(tmp_path / "t").sequences == (0, 1)
    seen: list[Progress] = []
    trace = run(resume=True, progress=seen.append)
    assert [p.sequences for p in seen if p.stage == "recording"] == [2, 4]
    assert contents(trace.path) == contents(whole.path)
    run(resume=True)  # nothing left to do


def test_resume_starts_what_is_not_there(run: Callable[..., Trace]) -> None:
    assert run(resume=True).sequences == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": "last:8"}, "other capture:"),
        ({"max_length": 30}, "capture, tokens"),
        ({"dtype": "float64"}, "dtype"),
        ({"layers": [1]}, "capture, layers"),
        ({"limit": 5}, "capture, tokens"),
    ],
)
def test_resume_with_other_settings_is_refused(
    changes: dict[str, Any], message: str, run: Callable[..., Trace], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        run(progress=stop_after(2))
    with pytest.raises(RetraceError, match=message):
        run(resume=True, **changes)
    assert open_trace(tmp_path / "t").sequences == (0, 1)


SCRIPT = """
import json, multiprocessing, os, signal, sys, threading
from transformers import MistralForCausalLM  # what takes seconds to import, once for all
from retrace.capture import capture
from retrace.traces import TraceWriter, bundles

def run(model, text, out, bundle):
    bundles.BUNDLE_POSITIONS = 40 * bundle
    finish_bundle, write_shard, finished = TraceWriter.finish_bundle, TraceWriter.write_shard, set()
    both_finished = threading.Event()
    def finishing(self, bundle, *what):
        finish_bundle(self, bundle, *what)
        finished.update(bundle)
        if len(finished) == 2:
            both_finished.set()
    def dying(self, bundle, layer, *shard):
        write_shard(self, bundle, layer, *shard)
        if (bundle.start, layer) == (2, 0):
            both_finished.wait()
            os.kill(os.getpid(), signal.SIGKILL)
    TraceWriter.finish_bundle, TraceWriter.write_shard = finishing, dying
    capture(model, text=[text], limit=4, max_length=40, batch_size=2, out=out)
fork = multiprocessing.get_context("fork")
for line in sys.stdin:
    child = fork.Process(target=run, args=json.loads(line))
    child.start()
    child.join()
    print(child.exitcode, flush=True)
"""


@pytest.fixture(scope="module")
def capture_and_die(asked: Callable[[str], Callable[..., int]]) -> Callable[..., int]:
    """Captures in a process that kills itself in the third sequence, and tells its exit code."""
    return asked(SCRIPT)


def test_killed_without_warning(
    run: Callable[..., Trace],
    bundle: int,
    capture_and_die: Callable[..., int],
    model_folder: Any,
    text_file: Path,
    tmp_path: Path,
) -> None:
    places = [str(model_folder("mistral")), str(text_file), str(tmp_path / "t"), bundle]
    assert capture_and_die(*places) == -signal.SIGKILL
    assert open_trace(tmp_path / "t").sequences == (0, 1)
    resumed = run(resume=True)
    assert contents(resumed.path) == contents(run(out=tmp_path / "whole").path)


def test_no_room_is_said_before_the_work(
    run: Callable[..., Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 12_345})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(RetraceError, match=r"takes 0\.\d\d MB and .* has 0\.01 MB free"):
        run()
    assert not (tmp_path / "t").exists()


def test_a_disk_that_fills_up(
    run: Callable[..., Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard = TraceWriter.write_shard

    def full(self: TraceWriter, bundle: range, *shard: Any) -> None:
        if 3 in bundle:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_shard(self, bundle, *shard)

    with monkeypatch.context() as patch:
        patch.setattr(TraceWriter, "write_shard", full)
        with pytest.raises(RetraceError, match=r"disk is full.*--resume"):
            run()
    # The error may come before the first two are marked.
    assert {2, 3}.isdisjoint(open_trace(tmp_path / "t").sequences)
    assert run(resume=True).sequences == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EROFS, "cannot be written"), (errno.EFBIG, "no file of this size")],
)
def test_a_place_that_takes_no_more(
    run: Callable[..., Trace],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    said: str,
) -> None:
    write_shard = TraceWriter.write_shard

    def refused(self: TraceWriter, bundle: range, *shard: Any) -> None:
        if 3 in bundle:
            raise OSError(number, os.strerror(number), str(tmp_path / "t" / "layers"))
        write_shard(self, bundle, *shard)

    with monkeypatch.context() as patch:
        patch.setattr(TraceWriter, "write_shard", refused)
        with pytest.raises(RetraceError, match=rf"{said}.*--resume"):
            run()
    assert run(resume=True).sequences == (0, 1, 2, 3)


def test_progress_counts_what_the_trace_holds(run: Callable[..., Trace]) -> None:
    seen: list[Progress] = []
    started = time.monotonic()
    trace = run(progress=seen.append)
    assert [p.stage for p in seen] == ["loading", "checking"] + ["recording"] * 3
    assert (seen[-1].sequences, seen[-1].tokens) == (4, 160)
    weights = [trace.layer(index).output_projection for index in trace.layers]
    held = trace.nbytes() + sum(one.nbytes for one in weights if one is not None)
    assert seen[-1].bytes == seen[-1].total_bytes == held
    assert time.monotonic() > started
