"""Captures of short sequences, several to a shard: what is handed out, written and gone on with."""

import hashlib
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import analyze
from retrace.capture import Progress, capture
from retrace.capture.model.lengths import LengthDependence
from retrace.capture.recording.queue import WriteQueue
from retrace.capture.recording.record import batches_of, shares_of
from retrace.traces import LayerRules, Trace, TraceWriter, create_trace, open_trace, verify_trace


@pytest.fixture
def run(model_folder: Any, text_file: Path, tmp_path: Path) -> Callable[..., Trace]:
    """Captures eleven sequences of 40 positions at tmp_path/t, with some options changed."""

    def run(**changes: Any) -> Trace:
        options: dict[str, Any] = {
            "limit": 11,
            "max_length": 40,
            "batch_size": 3,
            "out": tmp_path / "t",
        }
        options |= {"text": [text_file], **changes}
        return capture(str(model_folder("mistral")), **options)

    return run


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many sequences of 40 positions share a shard."""
    return lambda count: monkeypatch.setattr("retrace.traces.bundles.BUNDLE_POSITIONS", 40 * count)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every chunk and of every array's metadata, by path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent != folder  # the group's attributes hold the time
    }


@pytest.mark.parametrize("changes_at", [(), (5,), (5, 6, 13)])
@pytest.mark.parametrize("count", [1, 4, 23, 32])
@pytest.mark.parametrize("size", [1, 3, 8, 20])
@pytest.mark.parametrize("bundle", [1, 2, 8])
def test_shares_are_whole_batches_of_whole_bundles(
    bundle: int,
    size: int,
    count: int,
    changes_at: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = min(bundle, count)
    rotary = LengthDependence(longrope=changes_at)
    monkeypatch.setattr(LengthDependence, "of", lambda config: rotary)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: None))
    lengths = list(range(1, count + 1))
    batches = batches_of(model, lengths, size, bundle)
    assert [s for batch in batches for s in batch] == list(range(count))
    for batch in batches:
        assert 1 <= len(batch) <= size
        assert len({rotary.frequencies(lengths[s]) for s in batch}) == 1
    shares = shares_of(batches, bundle)
    assert [batch for share in shares for batch in share] == batches
    for share in shares:
        assert share[0].start % bundle == 0
        assert share[-1].stop % bundle == 0 or share is shares[-1]
    largest = max(sum(map(len, share)) for share in shares)
    assert largest <= max(size, bundle) or shares[-1][0].start > count - 2 * max(size, bundle)


def test_a_trace_with_shared_shards_holds_the_same(
    run: Callable[..., Trace], sharing: Callable[[int], None], tmp_path: Path
) -> None:
    sharing(1)
    single = run(out=tmp_path / "single")
    sharing(4)
    shared = run()
    assert (single.bundle, shared.bundle) == (1, 4)
    assert shared.sequences == single.sequences == tuple(range(11))
    assert verify_trace(shared).whole
    for sequence in shared.sequences:
        for ask in ("tokens", "nll", "query_positions", "phase"):
            one, other = (getattr(trace, ask)(sequence) for trace in (single, shared))
            # Batches end where bundles do, so that figures may differ by a rounding.
            np.testing.assert_allclose(one, other, rtol=1e-5)
        for index in shared.layers:
            for name in ("query", "key", "value"):
                one, other = (getattr(t.layer(index), name)(sequence) for t in (single, shared))
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    files = [sum(p.is_file() for p in t.path.rglob("*")) for t in (single, shared)]
    arrays = 6 + 3 * len(shared.layers)
    assert files[0] - files[1] == (11 - 3) * arrays
    ours, theirs = (
        analyze(trace, ["quest:page=4"], [3], out=tmp_path / f"r-{trace.bundle}").table()
        for trace in (single, shared)
    )
    numbers = ours.select_dtypes("number").columns
    np.testing.assert_allclose(ours[numbers], theirs[numbers], rtol=1e-3, atol=1e-4)


def test_some_layers_ragged_lengths_and_few_queries(
    run: Callable[..., Trace], sharing: Callable[[int], None], tmp_path: Path
) -> None:
    sharing(4)
    texts = [tmp_path / f"{n}.txt" for n in range(5)]
    for n, path in enumerate(texts):
        path.write_text("abcdefghijklmnopqrstuvwxyz"[: 7 + 4 * n])
    trace = run(text=texts, layers=[1], queries="last:3", batch_size=2)
    assert trace.layers == (1,) and trace.bundle == 4
    assert len({trace.length(s) for s in trace.sequences}) == 5
    assert verify_trace(trace).whole


class Stop(Exception):
    """Ends a capture from within."""


@pytest.mark.parametrize(("begun", "now"), [(1, 4), (4, 1), (2, 8)])
def test_what_is_begun_keeps_its_bundles(
    begun: int,
    now: int,
    run: Callable[..., Trace],
    sharing: Callable[[int], None],
    tmp_path: Path,
) -> None:
    def stop(progress: Progress) -> None:
        if progress.sequences >= 4:
            raise Stop

    sharing(begun)
    whole = run(out=tmp_path / "whole")
    with pytest.raises(Stop):
        run(progress=stop)
    sharing(now)
    resumed = run(resume=True)
    assert resumed.bundle == begun
    assert contents(resumed.path) == contents(whole.path)


KILLED = """
import json, multiprocessing, os, signal, sys, time
from transformers import MistralForCausalLM  # what takes seconds to import, once for all
from retrace.capture import capture
from retrace.traces import TraceWriter, bundles
write_shard = TraceWriter.write_shard
def slow(self, *shard):
    time.sleep(0.04)
    write_shard(self, *shard)
TraceWriter.write_shard = slow
def run(model, text, out, bundle):
    bundles.BUNDLE_POSITIONS = 40 * bundle
    capture(
        model, text=[text], limit=11, max_length=40, batch_size=3, out=out, resume=True
    )
fork = multiprocessing.get_context("fork")
for line in sys.stdin:
    delay, *places = json.loads(line)
    child = fork.Process(target=run, args=places)
    child.start()
    while not os.path.exists(places[2]):
        time.sleep(0.01)
    child.join(delay)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    print(child.exitcode, flush=True)
"""


@pytest.fixture(scope="module")
def capture_and_kill(asked: Callable[[str], Callable[..., int]]) -> Callable[..., int]:
    """Captures in a process that is killed after so many seconds, and tells its exit code."""
    return asked(KILLED)


@pytest.mark.parametrize(("bundle", "seed"), [(2, 0), (8, 1)])
def test_killed_at_any_moment(
    bundle: int,
    seed: int,
    run: Callable[..., Trace],
    sharing: Callable[[int], None],
    capture_and_kill: Callable[..., int],
    model_folder: Any,
    text_file: Path,
    tmp_path: Path,
) -> None:
    sharing(bundle)
    whole = run(out=tmp_path / "whole")
    rng = random.Random(seed)
    delays = [rng.uniform(0.1, 1.5) for _ in range(5)] + [300]
    out = tmp_path / "t"
    places = [str(model_folder("mistral")), str(text_file), str(out), bundle]
    before: set[int] = set()
    codes = []
    for delay in delays:
        codes.append(capture_and_kill(delay, *places))
        found = verify_trace(out)
        # All that is marked is there, in whole bundles, and stays.
        assert found.whole and before <= set(found.finished)
        before = set(found.finished)
        starts = {s - s % bundle for s in before}
        assert before == {s for start in starts for s in range(start, min(start + bundle, 11))}
    assert codes[-1] == 0 and set(codes[:-1]) <= {0, -signal.SIGKILL}
    assert contents(out) == contents(whole.path)


def make_writer(path: Path, count: int, bundle: int) -> TraceWriter:
    """A trace of sequences of 8 positions, with one layer of one head of 16 channels."""
    sizes = {"heads": 1, "kv_heads": 1, "key_dim": 16, "value_dim": 16}
    return create_trace(
        path,
        rules={0: LayerRules(module="m", scale=1.0, **sizes)},
        tokens=[np.arange(8, dtype=np.int32)] * count,
        query_positions=[np.arange(8, dtype=np.int32)] * count,
        dtype="float32",
        attributes={},
        bundle=bundle,
    )


def alike(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A layer whose queries, keys and values are the same."""
    return dict.fromkeys(("query", "key", "value"), tensor)


def test_memory_that_is_less_than_a_bundle(tmp_path: Path) -> None:
    """Half of a bundle fills the queue: what no write would free is let in nevertheless."""
    queue = WriteQueue(make_writer(tmp_path / "t", 8, 4), capacity=3 * 2 * 512)
    tensor = torch.ones(1, 8, 16)

    def give() -> None:
        with queue:
            for sequence in range(8):
                queue.write_layer(sequence, 0, alike(tensor))
                queue.finish_sequence(sequence, np.zeros(8, np.float32))
            queue.wait_for(range(8))

    giving = threading.Thread(target=give, daemon=True)
    giving.start()
    giving.join(60)
    assert not giving.is_alive()
    assert verify_trace(tmp_path / "t").whole_sequences == tuple(range(8))


def test_nothing_is_marked_before_its_whole_bundle_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard, held = TraceWriter.write_shard, threading.Event()

    def slow(self: TraceWriter, bundle: range, layer: int, name: str, *shard: Any) -> None:
        if name == "value":
            held.wait()
        write_shard(self, bundle, layer, name, *shard)

    monkeypatch.setattr(TraceWriter, "write_shard", slow)
    tensor, likelihoods = torch.ones(1, 8, 16), np.zeros(8, np.float32)
    with WriteQueue(make_writer(tmp_path / "t", 3, 2)) as queue:
        for sequence in range(3):
            assert open_trace(tmp_path / "t").sequences == ()
            queue.write_layer(sequence, 0, alike(tensor))
            queue.finish_sequence(sequence, likelihoods)
        time.sleep(0.2)
        assert open_trace(tmp_path / "t").sequences == ()
        held.set()
        queue.wait_for(range(3))
        assert open_trace(tmp_path / "t").sequences == (0, 1, 2)


def test_what_is_not_finite_is_named_by_its_sequence(tmp_path: Path) -> None:
    tensor = torch.ones(1, 8, 16)
    with (
        pytest.raises(ValueError, match="values that are not finite in sequence 1"),
        WriteQueue(make_writer(tmp_path / "t", 2, 2)) as queue,
    ):
        queue.write_layer(0, 0, alike(tensor))
        queue.write_layer(1, 0, alike(tensor) | {"value": tensor * torch.inf})
        queue.drain()
