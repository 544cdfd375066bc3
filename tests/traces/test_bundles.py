"""Several short sequences share their shards, and are still told apart."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from retrace.traces import (
    DamageError,
    RetraceError,
    bundle_size,
    create_trace,
    open_trace,
    resume_trace,
    verify_trace,
)

MakePlan = Callable[..., Any]
LENGTHS = (9, 1, 14, 3, 7)
NAMES = ("query", "key", "value")


@pytest.mark.parametrize(
    ("sequences", "positions", "sequence_bytes", "size"),
    [
        (2000, 16, 8192, 128),
        (100, 16, 8192, 100),
        (9000, 1, 16, 2048),
        (2000, 1000, 8192, 2),
        (2000, 1024, 8192, 2),
        (2000, 1025, 8192, 1),
        (2000, 2048, 8192, 1),
        (2000, 100_000, 8192, 1),
        (2000, 16, 6 << 20, 32),  # 8 billion parameters: 256 MiB are 42 sequences
        (2000, 16, 200 << 20, 1),
        (2000, 16, 300 << 20, 1),
        (1, 16, 8192, 1),
    ],
)
def test_how_many(sequences: int, positions: int, sequence_bytes: int, size: int) -> None:
    assert bundle_size(sequences, positions, sequence_bytes) == size


@pytest.fixture
def plan(make_plan: MakePlan) -> Any:
    """A plan of five ragged sequences with finite numbers."""
    plan = make_plan(lengths=LENGTHS)
    rng = np.random.default_rng(0)
    for tensors in plan.tensors.values():
        for tensor in tensors:
            tensor[:] = rng.standard_normal(tensor.shape)
    return plan


@pytest.fixture
def path(plan: Any, tmp_path: Path) -> Path:
    """A whole trace of bundles 0-1, 2-3 and 4; layers 0 and 3."""
    writer = create_trace(tmp_path / "t.zarr", **plan.arguments, bundle=2)
    plan.fill(writer, range(5))
    writer.close()
    return writer.path


def test_one_sequence_a_shard_is_written_as_ever(make_plan: MakePlan, tmp_path: Path) -> None:
    """The digest is that of what retrace wrote before sequences could share a shard."""
    plan = make_plan("bfloat16", lengths=(9, 1, 14))
    writer = create_trace(tmp_path / "t", **plan.arguments)
    plan.fill(writer, range(3))
    writer.close()
    known = hashlib.sha256()
    for file in sorted(writer.path.rglob("*")):
        if file.is_file() and file.name != "zarr.json":
            known.update(str(file.relative_to(writer.path)).encode())
            known.update(file.read_bytes())
    assert known.hexdigest() == "b307f30a9f3536551b474bd4103cf7d1ca20e8e4a8cd992f43f366edce766910"


@pytest.mark.parametrize("bundle", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_and_read_back(
    make_plan: MakePlan, tmp_path: Path, dtype: str, bundle: int
) -> None:
    queries = [range(0, n, 3) for n in LENGTHS]
    plan = make_plan(dtype, lengths=LENGTHS, queries=queries)
    writer = create_trace(tmp_path / "t.zarr", **plan.arguments, bundle=bundle)
    plan.fill(writer, range(5))
    writer.close()
    trace = open_trace(writer.path)
    assert trace.bundle == bundle
    assert trace.sequences == (0, 1, 2, 3, 4)
    group = zarr.open_group(writer.path, mode="r")
    for (index, sequence), tensors in plan.tensors.items():
        for name, tensor in zip(NAMES, tensors, strict=True):
            read = getattr(trace.layer(index), name)(sequence)
            assert read.tobytes() == np.ascontiguousarray(tensor).tobytes()
            some = getattr(trace.layer(index), name)(sequence, slice(1, 2))
            assert some.tobytes() == np.ascontiguousarray(tensor[1:2]).tobytes()
            array = group[f"layers/{index}/{name}"]
            assert isinstance(array, zarr.Array)
            padded = np.asarray(array[sequence])
            assert padded[:, : tensor.shape[1]].tobytes() == tensor.tobytes()
            assert not padded[:, tensor.shape[1] :].astype(np.float32).any()
    for sequence in range(5):
        np.testing.assert_array_equal(trace.tokens(sequence), plan.arguments["tokens"][sequence])
        np.testing.assert_array_equal(trace.nll(sequence), plan.nll[sequence])
        np.testing.assert_array_equal(trace.query_positions(sequence), queries[sequence])
    files = [p for p in (writer.path / "layers/0/key/c").rglob("*") if p.is_file()]
    assert len(files) == -(-5 // bundle)


def test_divergences_are_of_each_sequence(plan: Any, tmp_path: Path) -> None:
    writer = create_trace(tmp_path / "t", **plan.arguments, bundle=5, diverges=True)
    for layer in plan.arguments["rules"]:
        for name, parts in zip(
            NAMES, zip(*(plan.tensors[layer, s] for s in range(5)), strict=True), strict=True
        ):
            writer.write_shard(range(5), layer, name, 0, parts)
    kl = [np.full(n, s, np.float32) for s, n in enumerate(LENGTHS)]
    writer.finish_bundle(range(5), plan.nll, kl)
    trace = open_trace(writer.path)
    for sequence in range(5):
        np.testing.assert_array_equal(trace.kl(sequence), kl[sequence])  # type: ignore[arg-type]
    assert verify_trace(trace).whole


def test_only_whole_bundles_are_there(plan: Any, tmp_path: Path) -> None:
    writer = create_trace(tmp_path / "t", **plan.arguments, bundle=2)
    plan.fill(writer, [3])
    assert open_trace(writer.path).sequences == (2, 3)
    plan.fill(resume_trace(writer.path, **plan.arguments), [4])
    assert open_trace(writer.path).sequences == (2, 3, 4)
    found = verify_trace(writer.path)
    assert found.whole and found.whole_sequences == (2, 3, 4)


def test_a_part_of_a_bundle_is_not_written(plan: Any, tmp_path: Path) -> None:
    writer = create_trace(tmp_path / "t", **plan.arguments, bundle=2)
    with pytest.raises(ValueError, match="Sequences 0 to 1 share shards"):
        writer.write_layer(0, 0, *plan.tensors[0, 0])
    with pytest.raises(ValueError, match="Sequences 0 to 1 share shards"):
        writer.finish_sequence(1, plan.nll[1])
    with pytest.raises(ValueError, match="not 1 of them"):
        writer.write_shard(range(2), 0, "key", 0, [plan.tensors[0, 0][1]])
    with pytest.raises(ValueError, match="Sequences 0 to 1 share shards"):
        writer.write_shard(range(1, 3), 0, "key", 0, [plan.tensors[0, s][1] for s in (1, 2)])
    assert open_trace(writer.path).sequences == ()


@pytest.mark.parametrize("bundle", [0, 6])
def test_a_bundle_that_cannot_be(plan: Any, tmp_path: Path, bundle: int) -> None:
    with pytest.raises(ValueError, match=f"bundle of 5 sequences cannot have {bundle}"):
        create_trace(tmp_path / "t", **plan.arguments, bundle=bundle)


def test_long_sequences_share_no_shard(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrace.traces.writer.CHUNK_POSITIONS", 13)
    with pytest.raises(ValueError, match="more than 13 positions share no shard"):
        create_trace(tmp_path / "t", **plan.arguments, bundle=2)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("name", NAMES)
def test_damage_in_a_shared_shard_is_its_sequences(path: Path, name: str) -> None:
    heads, channels = {"query": (4, 6), "key": (2, 6), "value": (2, 3)}[name]
    of_sequence = heads * (14 * channels * 4 + 4)
    flip(path / f"layers/3/{name}/c/1/0/0/0", of_sequence + 5)  # the second's: sequence 3
    found = verify_trace(path)
    (damage,) = found.damages
    assert (damage.layer, damage.tensor, damage.sequence) == (3, name, 3)
    assert damage.cause == "checksum does not match"
    assert (found.whole_sequences, found.whole_layers) == ((0, 1, 2, 4), (0,))
    with pytest.raises(DamageError, match=f"{name} of layer 3, sequence 3 is damaged"):
        getattr(open_trace(path).layer(3), name)(3)


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda file: flip(file, -9), "checksum does not match"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "truncated"),
        (Path.unlink, "missing"),
    ],
    ids=["index", "end", "file"],
)
def test_damage_of_a_whole_shard_is_all_its_sequences(
    path: Path, spoil: Callable[[Path], None], cause: str
) -> None:
    spoil(path / "layers/0/key/c/1/0/0/0")
    found = verify_trace(path)
    assert [(d.layer, d.tensor, d.sequence) for d in found.damages] == [
        (0, "key", 2),
        (0, "key", 3),
    ]
    assert all(cause in damage.cause for damage in found.damages)
    assert found.whole_sequences == (0, 1, 4)


@pytest.mark.parametrize("name", ["tokens", "length", "query_positions", "phase", "nll"])
def test_damage_of_a_shared_row_is_all_its_sequences(path: Path, name: str) -> None:
    chunk = path / name / "c" / "1"
    flip(chunk if chunk.is_file() else chunk / "0", 2)
    found = verify_trace(path)
    named = {d.sequence for d in found.damages if d.tensor == name}
    assert named == {2, 3}
    assert found.whole_sequences == (0, 1, 4)


def change(path: Path, name: str, bundle: int) -> None:
    """Say that an array has other bundles than it has."""
    file = path / name / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["chunk_grid"]["configuration"]["chunk_shape"][0] = bundle
    file.write_text(json.dumps(metadata))


@pytest.mark.parametrize("name", ["tokens", "length", "nll", "done", "layers/3/key"])
def test_bundles_that_differ_are_no_traces(path: Path, name: str, plan: Any) -> None:
    change(path, name, 1)
    assert not verify_trace(path).whole
    with pytest.raises(RetraceError, match="is damaged"):
        resume_trace(path, **plan.arguments)


@pytest.mark.parametrize("bundle", [6, 10**12])
@pytest.mark.parametrize("name", ["length", "done", "layers/0/key"])
def test_more_than_there_are_is_refused_at_once(path: Path, name: str, bundle: int) -> None:
    change(path, name, bundle)
    begun = time.monotonic()
    with pytest.raises(DamageError, match=f"chunks hold {bundle:,} sequences"):
        trace = open_trace(path)
        assert trace.sequences
        trace.layer(0).key(0)
    assert time.monotonic() - begun < 2


def test_shards_of_several_are_whole_along_position(path: Path) -> None:
    file = path / "layers/0/key/zarr.json"
    metadata = json.loads(file.read_text())
    metadata["codecs"][0]["configuration"]["chunk_shape"][2] = 7
    file.write_text(json.dumps(metadata))
    with pytest.raises(DamageError, match="its shards are"):
        open_trace(path).layer(0).key(0)
