"""Whole shards of an array, put together here: zarr-python alone takes twice as long.

A shard is its inner chunks one after another, each with its CRC32C, and an index of where they are:
the `sharding_indexed` codec of Zarr v3 as `TraceWriter` sets it up. zarr-python encodes all shards
on one thread and copies them several times over; here each chunk goes to the file from the memory
that it is in, on any number of threads.
"""

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from retrace.traces.storage.arrays import MISSING
from retrace.traces.storage.durable import make_folder, written_whole
from retrace.traces.storage.objects import inside

Piece = bytes | memoryview


def shard_length(array: "zarr.Array[Any]") -> int:
    """Positions of one shard of an array (sequence, head, position, channel)."""
    assert array.shards is not None
    return int(array.shards[2])


def write_shards(array: "zarr.Array[Any]", sequence: int, tensor: npt.NDArray[Any]) -> None:
    """Write one sequence's tensor (heads, positions, channels), zero from there on, as whole shards
    of an array (sequence, head, position, channel)."""
    length = shard_length(array)
    for start in range(0, tensor.shape[1], length):
        write_shard(array, sequence, start, tensor[:, start : start + length])


def write_shard(
    array: "zarr.Array[Any]", sequence: int, start: int, part: npt.NDArray[Any]
) -> None:
    """Write the shard of `sequence` that begins at position `start`.

    Args:
        array: (sequence, head, position, channel), one sequence and all heads in a shard, one head
            and all channels in a chunk, chunks with CRC32C and nothing else.
        sequence: which.
        start: a multiple of the shard's length.
        part: (heads, positions, channels) of the array's dtype; zero from its end on.
    """
    length = shard_length(array)
    if start % length or part.shape[1] > length:
        raise ValueError(f"{part.shape[1]} positions from {start} are no shard of {length}.")
    pieces = _encode(part, array.chunks[2], length // array.chunks[2])
    # One shard spans all heads and channels, so that its key differs in two places only.
    key = array.metadata.encode_chunk_key((sequence, 0, start // length, 0))
    _put(array, key, pieces)


def write_row(array: "zarr.Array[Any]", sequence: int, row: npt.NDArray[Any]) -> None:
    """Write one sequence's row of an array (sequence, ...) with a sequence in a chunk, CRC32C and
    nothing else; also where all of it is the fill value, which zarr-python leaves out."""
    raw = np.ascontiguousarray(row, array.dtype).reshape(-1).view(np.uint8)
    key = array.metadata.encode_chunk_key((sequence, *(0 for _ in array.shape[1:])))
    _put(array, key, [raw.data, _checksum(raw)])


def _put(array: "zarr.Array[Any]", key: str, pieces: list[Piece]) -> None:
    key, store = f"{array.path}/{key}".lstrip("/"), array.store
    if isinstance(store, LocalStore):
        _write_file(inside(store.root, key), pieces)
    else:
        buffer = default_buffer_prototype().buffer.from_bytes(b"".join(pieces))
        sync(store.set(key, buffer))


def _encode(part: npt.NDArray[Any], chunk_length: int, chunks: int) -> list[Piece]:
    """A shard of (heads, positions, channels) as pieces to be written one after another."""
    heads, positions, channels = part.shape
    index = np.full((heads, chunks, 2), MISSING, "<u8")
    pieces: list[Piece] = []
    offset = 0
    for head in range(heads):
        for chunk in range(-(-positions // chunk_length)):
            held = part[head, chunk * chunk_length : (chunk + 1) * chunk_length]
            if len(held) < chunk_length:  # a chunk is whole, also at the end of a sequence
                padded = np.zeros((chunk_length, channels), part.dtype)
                padded[: len(held)] = held
                held = padded
            raw = np.ascontiguousarray(held).view(np.uint8).reshape(-1)
            pieces += [raw.data, _checksum(raw)]
            index[head, chunk] = offset, len(raw) + 4
            offset += len(raw) + 4
    entries = index.tobytes()
    return [*pieces, entries, _checksum(entries)]


def _checksum(data: bytes | npt.NDArray[np.uint8]) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def _write_file(path: Path, pieces: list[Piece]) -> None:
    """Write a file that is there whole and on the disk, or not at all."""
    make_folder(path.parent)
    # A shard has one writer: what a killed one left is overwritten by who writes the shard again.
    with written_whole(path) as file:
        file.writelines(pieces)
