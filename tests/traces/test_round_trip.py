"""What is written is read back, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zarr.storage import LocalStore

from retrace.traces import create_trace, open_trace, to_numpy, to_torch
from retrace.traces import writer as trace_writer
from retrace.traces.schema import DTYPES

Array = np.ndarray[Any, np.dtype[Any]]
MakePlan = Callable[..., Any]


def assert_same_bits(ours: Array, theirs: Array) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert np.ascontiguousarray(ours).tobytes() == np.ascontiguousarray(theirs).tobytes()


@pytest.mark.parametrize("queries", [None, [[2, 8], [0], [1, 5, 9, 13]]], ids=["all", "sampled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors(
    make_plan: MakePlan, tmp_path: Path, dtype: str, queries: list[list[int]] | None
) -> None:
    plan = make_plan(dtype, queries=queries)
    writer = create_trace(tmp_path / "t.zarr", **plan.arguments)
    plan.fill(writer, range(3))
    for _ in ("as written", "with consolidated metadata"):
        trace = open_trace(tmp_path / "t.zarr")
        assert trace.dtype == DTYPES[dtype]
        for (layer, sequence), tensors in plan.tensors.items():
            recorded = trace.layer(layer)
            read = (recorded.query, recorded.key, recorded.value)
            for name, tensor in zip(read, tensors, strict=True):
                assert_same_bits(name(sequence), tensor)
        writer.close()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [0.0, -0.0, np.nan, np.inf])
def test_tensors_of_one_number(
    make_plan: MakePlan, tmp_path: Path, dtype: str, number: float
) -> None:
    plan = make_plan(dtype)
    for tensors in plan.tensors.values():
        for tensor in tensors:
            tensor[:] = number
    writer = create_trace(tmp_path / "t.zarr", **plan.arguments)
    plan.fill(writer, range(3))
    assert_same_bits(open_trace(writer.path).layer(0).key(2), plan.tensors[0, 2][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_and_back(make_plan: MakePlan, dtype: str) -> None:
    for tensors in make_plan(dtype).tensors.values():
        for array in tensors:
            assert_same_bits(to_numpy(to_torch(array)), array)


def test_some_heads(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    plan.fill(create_trace(tmp_path / "t.zarr", **plan.arguments), range(3))
    layer = open_trace(tmp_path / "t.zarr").layer(3)
    query, key, value = plan.tensors[3, 2]
    assert_same_bits(layer.query(2, slice(2, 4)), query[2:4])
    assert_same_bits(layer.key(2, slice(1, 2)), key[1:2])
    assert_same_bits(layer.value(2, slice(0, 1)), value[:1])


def test_sequences(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan(queries=[[2, 8], [0], [1, 5, 9, 13]])
    plan.fill(create_trace(tmp_path / "t.zarr", **plan.arguments), range(3))
    trace = open_trace(tmp_path / "t.zarr")
    assert (trace.planned, trace.sequences, trace.layers) == (3, (0, 1, 2), (0, 3))
    for s, length in enumerate((9, 1, 14)):
        assert trace.length(s) == length
        assert_same_bits(trace.tokens(s), plan.arguments["tokens"][s])
        assert_same_bits(trace.nll(s), plan.nll[s])
        assert_same_bits(trace.query_positions(s), plan.arguments["query_positions"][s])
    likelihoods = np.concatenate(plan.nll)
    wanted = np.exp(np.nanmean(likelihoods.astype(np.float64)))
    assert trace.perplexity() == pytest.approx(wanted)


def test_rules_and_attributes(make_plan: MakePlan, rules: Any, tmp_path: Path) -> None:
    layers = {
        1: rules(window=7, softcap=30.0),
        12: rules(chunk=16, sinks=(0.5, -1.0, 2.0, 1e-3), scale=0.1),
    }
    plan = make_plan(rules=layers)
    create_trace(tmp_path / "t.zarr", **plan.arguments)
    trace = open_trace(tmp_path / "t.zarr")
    assert trace.layers == (1, 12)
    assert {i: trace.layer(i).rules for i in trace.layers} == layers
    assert trace.attributes["model"] == "random"


def test_long_sequences_are_several_chunks_and_shards(
    make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_writer, "CHUNK_POSITIONS", 4)
    monkeypatch.setattr(trace_writer, "SHARD_BYTES", 1000)
    plan = make_plan("float16", lengths=(33, 70))
    plan.fill(create_trace(tmp_path / "t.zarr", **plan.arguments), range(2))
    trace = open_trace(tmp_path / "t.zarr")
    for (layer, sequence), tensors in plan.tensors.items():
        assert_same_bits(trace.layer(layer).query(sequence), tensors[0])
        assert_same_bits(trace.layer(layer).key(sequence), tensors[1])
    shards = [p for p in (tmp_path / "t.zarr/layers/0/query/c").rglob("*") if p.is_file()]
    assert len(shards) > 2


def test_two_sequences_share_no_file(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    writer = create_trace(tmp_path / "t.zarr", **plan.arguments)

    def contents() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in writer.path.rglob("*") if p.is_file()}

    plan.fill(writer, [0])
    before = contents()
    plan.fill(writer, [2])
    after = contents()
    assert all(after[path] == data for path, data in before.items())
    assert len(after) > len(before)


def test_another_dtype_is_not_converted(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan("float16")
    writer = create_trace(tmp_path / "t.zarr", **plan.arguments)
    with pytest.raises(TypeError, match=r"float32.*float16"):
        writer.write_layer(0, 0, *(t.astype(np.float32) for t in plan.tensors[0, 0]))


def test_what_is_created_is_written_once(
    make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object store may apply the first of two writes last."""
    put, written = LocalStore.set, dict[str, bytes]()

    async def note(self: LocalStore, key: str, value: Any) -> None:
        assert written.setdefault(key, value.to_bytes()) == value.to_bytes()
        await put(self, key, value)

    monkeypatch.setattr(LocalStore, "set", note)
    create_trace(tmp_path / "t.zarr", **make_plan().arguments)
    assert {"zarr.json", "phase/zarr.json", "layers/3/zarr.json"} <= written.keys()
