"""Traces are read by programs that know nothing of retrace."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.traces import open_trace
from retrace.traces.bfloat16 import BFloat16
from retrace.traces.schema import DTYPES


@pytest.mark.parametrize("bundle", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorstore(write_trace: Callable[..., Path], dtype: str, bundle: int) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    path = write_trace(dtype=dtype, bundle=bundle)
    layer = open_trace(path).layer(0)
    for name, tensor in (
        ("query", layer.query(2)),
        ("key", layer.key(2)),
        ("value", layer.value(2)),
    ):
        store = {"driver": "file", "path": f"{path}/layers/0/{name}"}
        array = tensorstore.open({"driver": "zarr3", "kvstore": store}).result()
        read = array[2].read().result()[:, : tensor.shape[1]]
        assert read.dtype == DTYPES[dtype]
        assert np.ascontiguousarray(read).tobytes() == np.ascontiguousarray(tensor).tobytes()
        assert array.domain.labels[1] == ("head" if name == "query" else "kv_head")


def read_by_zarr(path: Path, imports: str) -> tuple[str, str]:
    """Data type and numbers (as hex digits) of a tensor, read in a program of its own."""
    program = f"""
import sys, zarr
{imports}
array = zarr.open_group(sys.argv[1], mode="r")["layers/0/key"]
print(array.dtype, array[2].tobytes().hex())
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    dtype, numbers = ran.stdout.split()
    return dtype, numbers


@pytest.mark.parametrize("bundle", [1, 2])
def test_zarr_with_the_type_imported(write_trace: Callable[..., Path], bundle: int) -> None:
    path = write_trace(dtype="bfloat16", bundle=bundle)
    numbers = open_trace(path).layer(0).key(2).tobytes().hex()
    assert read_by_zarr(path, "import retrace.traces") == ("bfloat16", numbers)


@pytest.mark.xfail(
    reason="zarr 3.1.6 lists the entry points of data types and never loads them", strict=False
)
def test_zarr_alone(write_trace: Callable[..., Path]) -> None:
    path = write_trace(dtype="bfloat16")
    numbers = open_trace(path).layer(0).key(2).tobytes().hex()
    assert read_by_zarr(path, "") == ("bfloat16", numbers)


def test_type_is_an_entry_point() -> None:
    (point,) = entry_points(group="zarr.data_type", name="bfloat16")
    assert point.load() is BFloat16


@pytest.mark.parametrize(("dtype", "bundle"), [("float32", 1), ("float16", 1), ("float32", 2)])
def test_xarray(write_trace: Callable[..., Path], dtype: str, bundle: int) -> None:
    xarray = pytest.importorskip("xarray")
    path = write_trace(dtype=dtype, bundle=bundle)
    root = xarray.open_zarr(path, consolidated=False, decode_cf=False, chunks=None)
    assert dict(root.sizes) == {"sequence": 3, "position": 14, "query_position": 14}
    assert root["tokens"].dims == ("sequence", "position")
    assert root["done"].to_numpy().tolist() == [True] * 3
    layer = xarray.open_zarr(
        path, group="layers/3", consolidated=False, decode_cf=False, chunks=None
    )
    assert layer["query"].dims == ("sequence", "head", "query_position", "channel")
    assert layer["key"].dims == ("sequence", "kv_head", "position", "channel")
    assert layer["value"].dims == ("sequence", "kv_head", "position", "value_channel")
    assert layer.attrs["window"] == 5
    np.testing.assert_array_equal(layer["key"][2].to_numpy(), open_trace(path).layer(3).key(2))


@pytest.mark.parametrize(("bundle", "version"), [(1, 1), (2, 2), (3, 2)])
def test_metadata(write_trace: Callable[..., Path], bundle: int, version: int) -> None:
    path = write_trace(dtype="bfloat16", bundle=bundle)

    def metadata(name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((path / name / "zarr.json").read_text())
        return loaded

    # What every retrace reads stays of the first version.
    assert metadata("")["attributes"]["retrace_format"] == version
    key = metadata("layers/0/key")
    assert key["data_type"] == "bfloat16"
    assert key["dimension_names"] == ["sequence", "kv_head", "position", "channel"]
    (sharding,) = key["codecs"]
    assert sharding["name"] == "sharding_indexed"
    # One shard is one bundle, one inner chunk one head of one sequence.
    assert key["chunk_grid"]["configuration"]["chunk_shape"] == [bundle, 2, 14, 6]
    assert sharding["configuration"]["chunk_shape"] == [1, 1, 14, 6]
    assert "crc32c" in [codec["name"] for codec in sharding["configuration"]["codecs"]]
    for name in ("tokens", "phase", "nll", "length", "done", "query_positions"):
        assert metadata(name)["chunk_grid"]["configuration"]["chunk_shape"][0] == bundle
