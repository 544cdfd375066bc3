"""Every damaged array is named with its cause, and what is whole is told."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.traces import DamageError, create_trace, open_trace, verify_trace

MakePlan = Callable[..., Any]


@pytest.fixture
def path(tmp_path: Path, make_plan: MakePlan) -> Path:
    """A whole trace of finite numbers: layers 0 and 3, sequences of 9, 1 and 14 positions."""
    plan = make_plan()
    rng = np.random.default_rng(0)
    for tensors in plan.tensors.values():
        for tensor in tensors:
            tensor[:] = rng.standard_normal(tensor.shape)
    writer = create_trace(tmp_path / "t.zarr", **plan.arguments)
    plan.fill(writer, range(3))
    writer.close()
    return writer.path


def shard(path: Path, name: str, sequence: int) -> Path:
    """A sequence's file of an array."""
    found = [p for p in (path / name / "c" / str(sequence)).rglob("*") if p.is_file()]
    return found[0] if found else path / name / "c" / str(sequence)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[1] ^= 4
    file.write_bytes(bytes(data))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def lead_out(file: Path) -> None:
    elsewhere = file.parents[8] / "elsewhere"
    shutil.copy(file, elsewhere)
    file.unlink()
    file.symlink_to(elsewhere)


def wait_for_ever(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def damages(path: Path) -> list[tuple[int | None, str, int | None]]:
    return [(d.layer, d.tensor, d.sequence) for d in verify_trace(path).damages]


def test_a_whole_trace(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = verify_trace(path, progress=lambda *done: seen.append(done))
    assert found.whole
    assert (found.planned, found.finished, found.layers) == (3, (0, 1, 2), (0, 3))
    assert (found.whole_sequences, found.whole_layers) == ((0, 1, 2), (0, 3))
    assert found.bytes == open_trace(path).nbytes()
    assert seen == [(n, 6) for n in range(7)]


def test_every_array_has_checksums(path: Path) -> None:
    arrays = 0
    for file in path.rglob("zarr.json"):
        metadata = json.loads(file.read_text())
        if metadata["node_type"] == "array":
            arrays += 1
            codecs = metadata["codecs"]
            if codecs[0]["name"] == "sharding_indexed":
                codecs = codecs[0]["configuration"]["codecs"]
            assert [codec["name"] for codec in codecs] == ["bytes", "crc32c"], file
    assert arrays == 6 + 2 * 3


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (flip, "checksum does not match"),
        (cut, "truncated"),
        (empty, "truncated"),
        (grow, "bytes, not"),
        (Path.unlink, "missing"),
        (lead_out, "leads out of the trace"),
        (wait_for_ever, "no regular file"),
    ],
)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_damaged_tensor(path: Path, name: str, spoil: Callable[[Path], None], cause: str) -> None:
    spoil(shard(path, f"layers/3/{name}", 2))
    found = verify_trace(path)
    (damage,) = found.damages
    assert (damage.layer, damage.tensor, damage.sequence) == (3, name, 2)
    assert cause in damage.cause
    assert (found.whole_sequences, found.whole_layers) == ((0, 1), (0,))
    with pytest.raises(DamageError, match=rf"{name} of layer 3, sequence 2 .*retrace verify"):
        getattr(open_trace(path).layer(3), name)(2)


@pytest.mark.parametrize("name", ["tokens", "length", "query_positions", "phase", "nll"])
@pytest.mark.parametrize("spoil", [flip, cut, empty, grow, Path.unlink])
def test_a_damaged_small_array(path: Path, name: str, spoil: Callable[[Path], None]) -> None:
    spoil(shard(path, name, 0))
    found = verify_trace(path)
    assert (None, name, 0) in [(d.layer, d.tensor, d.sequence) for d in found.damages]
    assert {d.sequence for d in found.damages} == {0}
    assert found.whole_sequences == (1, 2)


@pytest.mark.parametrize("spoil", [flip, cut, empty, grow])
def test_a_damaged_mark(path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(shard(path, "done", 0))
    assert damages(path) == [(None, "done", 0)]
    assert verify_trace(path).whole_sequences == (1, 2)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_finite(tmp_path: Path, make_plan: MakePlan, number: float) -> None:
    plan = make_plan("bfloat16")
    for tensors in plan.tensors.values():
        for tensor in tensors:
            tensor[:] = 1
    plan.tensors[3, 2][1][1, 4, 2] = number
    plan.nll[0][3] = number
    plan.fill(create_trace(tmp_path / "t", **plan.arguments), range(3))
    assert damages(tmp_path / "t") == [(None, "nll", 0), (3, "key", 2)]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"shape": [3, 2, 10**15, 6]}, r"its shape is \[3, 2, 1000000000000000, 6\], not"),
        ({"shape": [3, 2, -14, 6]}, "whole numbers"),
        ({"data_type": "float64"}, "its dtype is float64, not float32"),
        ({"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}, "no checksum"),
        ({"codecs": [{"name": "vlen-bytes"}]}, "codecs are"),
        ({"zarr_format": 2}, "version 3"),
        ({"node_type": "group"}, "not those of an array"),
        ({"attributes": {"new": 1}}, "not what the finished capture noted"),
    ],
    ids=str,
)
def test_metadata_that_does_not_fit(path: Path, changes: dict[str, Any], cause: str) -> None:
    file = path / "layers/3/key/zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    found = verify_trace(path)
    assert {(d.layer, d.tensor) for d in found.damages} == {(3, "key")}
    assert found.damages[0].sequence is None
    found.damages[0].args  # noqa: B018 - what it was made with
    with pytest.raises(DamageError, match=cause):
        raise found.damages[0]
    assert (found.whole_sequences, found.whole_layers) == ((), (0,))


def test_a_layer_that_is_gone(path: Path) -> None:
    shutil.rmtree(path / "layers/3")
    found = verify_trace(path)
    assert (found.damages[0].layer, found.damages[0].cause) == (3, "its zarr.json is missing")
    assert found.whole_layers == (0,)


def test_rules_that_do_not_fit(path: Path) -> None:
    file = path / "layers/3/zarr.json"
    metadata = json.loads(file.read_text())
    metadata["attributes"]["heads"] = 8
    file.write_text(json.dumps(metadata))
    assert (3, "query", None) in damages(path)


def test_unfinished_sequences_are_nobodys_damage(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan()
    for tensors in plan.tensors.values():
        for tensor in tensors:
            tensor[:] = 1
    writer = create_trace(tmp_path / "t", **plan.arguments)
    writer.write_layer(2, 0, *plan.tensors[0, 2])
    plan.fill(writer, [1])
    found = verify_trace(writer.path)
    assert (found.whole, found.planned, found.finished) == (True, 3, (1,))


def test_damage_is_carried_between_processes(path: Path) -> None:
    flip(shard(path, "layers/0/key", 0))
    with pytest.raises(DamageError) as raised:
        open_trace(path).layer(0).key(0)
    carried = pickle.loads(pickle.dumps(raised.value))
    assert str(carried) == str(raised.value)
    assert (carried.layer, carried.sequence) == (0, 0)
