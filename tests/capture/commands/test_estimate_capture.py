"""What a capture will come to is told before it is begun, and nothing is written."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from retrace.capture import CaptureEstimate, CaptureSettings, capture, estimate_capture
from retrace.capture.recording.record import Progress
from retrace.cli.main import main
from retrace.traces import RetraceError


@pytest.fixture
def options(model_folder: Any, text_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "pretrained": str(model_folder("llama")),
        "text": [text_file],
        "limit": 5,
        "max_length": 64,
        "out": tmp_path / "traces" / "t.zarr",
    }


def estimated(**options: Any) -> CaptureEstimate:
    return estimate_capture(CaptureSettings(**options))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"queries": "last:4", "layers": [1], "batch_size": 2},
        {"generate": 3},
        {"approximate": "quest:page=4", "topk": 4, "device_map": "auto"},
    ],
    ids=["whole", "in part", "decoded", "approximate"],
)
def test_what_the_capture_comes_to(options: dict[str, Any], more: dict[str, Any]) -> None:
    cost = estimated(**options, **more)
    assert not options["out"].parent.exists()
    trace = capture(**options, **more)
    tokens = sum(trace.length(s) for s in trace.sequences)
    assert cost.sequences == len(trace.sequences)
    assert tokens <= cost.tokens <= tokens + 3 * len(trace.sequences)
    projections = len(trace.layers) * 64 * 64 * 4
    assert trace.nbytes() <= cost.bytes - projections <= trace.nbytes() * 64 / 60
    assert cost.memory["cpu"] > cost.bytes
    assert cost.free_bytes is not None and cost.free_bytes > 0


def test_the_time(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the longest sequence, and of others by their share of it."""
    from retrace.capture.commands import estimate_capture as module

    begun = iter([100.0, 107.0])
    monkeypatch.setattr(module, "_now", lambda: next(begun))
    started = time.monotonic()
    cost = estimated(**options)
    assert cost.seconds == pytest.approx(5 * 7.0)  # all are as long as the longest
    assert 0 < cost.preparation < time.monotonic() - started


def test_what_is_left(options: dict[str, Any]) -> None:
    whole = estimated(**options)
    capture(**options)
    with pytest.raises(RetraceError, match="exists: go on with it by --resume"):
        estimated(**options)
    nothing = estimated(**options, resume=True)
    assert (nothing.sequences, nothing.tokens, nothing.bytes, nothing.seconds) == (0, 0, 0, 0.0)
    anew = estimated(**options, overwrite=True)
    assert (anew.sequences, anew.tokens, anew.bytes) == (5, whole.tokens, whole.bytes)


def test_how_far_it_is(options: dict[str, Any]) -> None:
    told: list[Progress] = []
    estimate_capture(CaptureSettings(**options), told.append)
    assert [one.stage for one in told] == ["loading", "checking"]


def test_of_one_process(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RetraceError, match="estimate with one"):
        estimated(**options)


def test_on_the_command_line(options: dict[str, Any]) -> None:
    options["text"] = options["text"][0]
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    run = CliRunner().invoke(main, ["capture", *arguments, "--dry-run"])
    assert run.exit_code == 0, run.output
    assert "5 sequences, 320 tokens" in run.stdout
    assert "are free there" in run.stdout and "of loading and checks" in run.stdout
    run = CliRunner().invoke(main, ["capture", *arguments, "--dry-run", "--format", "json"])
    assert json.loads(run.stdout)["tokens"] == 320
    run = CliRunner().invoke(main, ["capture", *arguments, "--format", "json"])
    assert json.loads(run.stdout)["tokens"] == 320
    assert json.loads(run.stdout)["trace"] == str(options["out"])
