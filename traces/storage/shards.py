"""Whole shards of an array, put together here: zarr-python alone takes twice as long.

A shard is its inner chunks one after another, each with its CRC32C, and an index of where they are:
the `sharding_indexed` codec of Zarr v3 as `TraceWriter` sets it up. zarr-python encodes all shards
on one thread and copies them several times over; here each chunk goes to the file from the memory
that it is in, on any number of threads.
"""

from collections.abc import Sequence
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
    of an array (sequence, head, position, channel) with a sequence in a shard."""
    length = shard_length(array)
    for start in range(0, tensor.shape[1], length):
        write_shard(array, sequence, start, [tensor[:, start : start + length]])


def write_shard(
    array: "zarr.Array[Any]", sequence: int, start: int, parts: Sequence[npt.NDArray[Any]]
) -> None:
    """Write the shard that begins with `sequence` at position `start`.

    Args:
        array: (sequence, head, position, channel), all heads in a shard, one sequence and head and
            all channels in a chunk, chunks with CRC32C and nothing else.
        sequence: the shard's first.
        start: a multiple of the shard's length.
        parts: what each sequence has in the shard, (heads, positions, channels) of the array's
            dtype; zero from its end on. Nothing is stored of sequences that follow these.
    """
    assert array.shards is not None
    bundle, length = int(array.shards[0]), shard_length(array)
    if start % length or any(part.shape[1] > length for part in parts):
        longest = max(part.shape[1] for part in parts)
        raise ValueError(f"{longest} positions from {start} are no shard of {length}.")
    if sequence % bundle or len(parts) > bundle:
        raise ValueError(f"{len(parts)} sequences from {sequence} are no shard of {bundle}.")
    pieces = _encode(parts, bundle, array.chunks[2], length // array.chunks[2])
    # One shard spans all heads and channels, so that its key differs in two places only.
    key = array.metadata.encode_chunk_key((sequence // bundle, 0, start // length, 0))
    _put(array, key, pieces)


def write_rows(array: "zarr.Array[Any]", sequence: int, rows: npt.NDArray[Any]) -> None:
    """Write the chunk of an array (sequence, ...) that begins with `sequence`: its rows
    (sequences, ...), of which the last may be missing at the array's end. Chunks have whole
    sequences, CRC32C and nothing else, also where they are the fill value all over, which
    zarr-python leaves out."""
    chunk = np.full(array.chunks, array.fill_value, array.dtype)
    chunk[: len(rows)] = rows
    raw = chunk.reshape(-1).view(np.uint8)
    number = sequence // array.chunks[0]
    key = array.metadata.encode_chunk_key((number, *(0 for _ in array.shape[1:])))
    _put(array, key, [raw.data, _checksum(raw)])


def _put(array: "zarr.Array[Any]", key: str, pieces: list[Piece]) -> None:
    key, store = f"{array.path}/{key}".lstrip("/"), array.store
    if isinstance(store, LocalStore):
        _write_file(inside(store.root, key), pieces)
    else:
        buffer = default_buffer_prototype().buffer.from_bytes(b"".join(pieces))
        sync(store.set(key, buffer))


def _encode(
    parts: Sequence[npt.NDArray[Any]], bundle: int, chunk_length: int, chunks: int
) -> list[Piece]:
    """A shard of sequences (heads, positions, channels), as pieces to be written in order."""
    heads, _, channels = parts[0].shape
    index = np.full((bundle, heads, chunks, 2), MISSING, "<u8")
    pieces: list[Piece] = []
    offset = 0
    for row, part in enumerate(parts):
        for head in range(heads):
            for chunk in range(-(-part.shape[1] // chunk_length)):
                held = part[head, chunk * chunk_length : (chunk + 1) * chunk_length]
                if len(held) < chunk_length:  # a chunk is whole, also at the end of a sequence
                    padded = np.zeros((chunk_length, channels), part.dtype)
                    padded[: len(held)] = held
                    held = padded
                raw = np.ascontiguousarray(held).view(np.uint8).reshape(-1)
                pieces += [raw.data, _checksum(raw)]
                index[row, head, chunk] = offset, len(raw) + 4
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
