"""Shards that are put together here read the same in zarr-python and in tensorstore."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec

import retrace.traces
from retrace.traces.storage.shards import write_shards


@pytest.mark.parametrize("positions", [1, 8, 11, 16, 37, 40])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_shards_read_back(positions: int, dtype: type, tmp_path: Path) -> None:
    assert retrace.traces  # registers bfloat16
    array = zarr.create_array(
        tmp_path / "a.zarr",
        shape=(2, 3, 40, 4),
        chunks=(1, 1, 8, 4),
        shards=(1, 3, 16, 4),
        dtype=np.dtype(dtype),
        compressors=(Crc32cCodec(),),
    )
    tensor = np.random.default_rng(0).normal(size=(3, positions, 4)).astype(dtype)
    write_shards(array, 1, tensor)
    padded = np.zeros((2, 3, 40, 4), dtype)
    padded[1, :, :positions] = tensor
    np.testing.assert_array_equal(array[:], padded)
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    kvstore = {"driver": "file", "path": str(tmp_path / "a.zarr")}
    other = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
    np.testing.assert_array_equal(other.read().result(), padded)
