"""Arrays of a trace, read without trust: anybody may have written their metadata and bytes.

Only what format version 1 writes is read: regular chunks of numbers, each with its CRC32C and
nothing else, so that how large everything must be follows from the metadata and is compared with
what is stored before memory is taken. zarr-python would take the metadata's word for it, read what
is not there as fill values, and open other formats, one of which unpickles.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from retrace.traces.bundles import MOST_SEQUENCES
from retrace.traces.errors import DamageError
from retrace.traces.storage.objects import Objects, Range

MOST_METADATA = 1 << 26
"""Bytes of the largest `zarr.json` that is read: the consolidated metadata of a thousand layers
take some four million."""
CHECKSUM_BYTES = 4
MISSING = (1 << 64) - 1
"""Offset and length, in a shard's index, of a chunk that holds fill values only."""


class Stored:
    """The objects of a trace, and how a fault in one is named."""

    def __init__(self, place: str, objects: Objects) -> None:
        self.place = place
        self.objects = objects

    def damage(self, array: str, cause: str, sequence: int | None = None) -> DamageError:
        """The error that an array, or one sequence of it, is damaged."""
        return DamageError(self.place, array, sequence, cause)

    def metadata(self, name: str) -> dict[str, Any] | None:
        """The metadata of an array or group; None where there are none."""
        key = f"{name}/zarr.json".lstrip("/")
        try:
            (raw,) = self.objects.first_bytes([key], MOST_METADATA + 1)
        except OSError as error:
            raise self.damage(name, f"{key} cannot be read: {_words(error)}") from error
        if raw is None:
            return None
        if len(raw) > MOST_METADATA:
            raise self.damage(name, f"{key} has more than {MOST_METADATA:,} bytes")
        try:
            metadata = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise self.damage(name, f"{key} is no JSON: {_words(error)}") from error
        if not isinstance(metadata, dict) or metadata.get("zarr_format") != 3:
            raise self.damage(name, f"{key} is no metadata of Zarr version 3")
        return metadata

    def attributes(self, name: str) -> dict[str, Any] | None:
        """The attributes of a group; None where there is none."""
        metadata = self.metadata(name)
        if metadata is None:
            return None
        attributes = metadata.get("attributes", {})
        if metadata.get("node_type") != "group" or not isinstance(attributes, dict):
            raise self.damage(name, "its metadata are not those of a group with attributes")
        return attributes


class _Array:
    """What arrays of rows and of tensors have in common: metadata that are as expected."""

    def __init__(
        self, stored: Stored, name: str, dtype: np.dtype[Any], shape: tuple[int | None, ...]
    ) -> None:
        """Refuses an array of another dtype or shape; an extent that may be any is None."""
        metadata = stored.metadata(name)
        if metadata is None:
            raise stored.damage(name, "its zarr.json is missing")
        self.stored, self.name, self.dtype = stored, name, dtype
        if metadata.get("node_type") != "array":
            raise self.damage("its metadata are not those of an array")
        if metadata.get("data_type") != dtype.name:
            raise self.damage(
                f"its dtype is {_short(metadata.get('data_type'))}, not {dtype.name}, as it should"
            )
        self.shape = self._extents(metadata.get("shape"), "shape")
        fits = len(self.shape) == len(shape) and all(
            wanted in (None, there) for wanted, there in zip(shape, self.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise self.damage(f"its shape is {_short(list(self.shape))}, not [{wanted}]")
        self.outer = self._grid(metadata)
        if metadata.get("storage_transformers"):
            raise self.damage("it has storage transformers")
        if self._names(metadata.get("codecs")) == ["sharding_indexed"]:
            self.inner = self._sharding(metadata["codecs"][0].get("configuration"))
        else:
            self._check_codecs(metadata.get("codecs"))
            self.inner = self.outer

    def _in_bundles(self) -> int:
        """Sequences in each shard or chunk; refuses an array (sequence, ...) of too many."""
        bundle = self.outer[0] if self.outer else 0
        if not 1 <= bundle <= min(self.shape[0], MOST_SEQUENCES):
            raise self.damage(
                f"its chunks hold {bundle:,} sequences: not 1 to {MOST_SEQUENCES:,} of its own"
            )
        return bundle

    def damage(self, cause: str, sequence: int | None = None) -> DamageError:
        """The error that the array, or one sequence of it, is damaged."""
        return self.stored.damage(self.name, cause, sequence)

    @contextmanager
    def readable(self, sequence: int) -> Iterator[None]:
        """What the system refuses to read, as damage of a sequence."""
        try:
            yield
        except (OSError, MemoryError) as error:
            raise self.damage(f"cannot be read: {_words(error)}", sequence) from error

    def verified(
        self, data: bytes | memoryview, wanted: int, sequence: int | None = None
    ) -> npt.NDArray[np.uint8]:
        """`wanted` bytes less the checksum that they end with."""
        if len(data) != wanted:
            raise self.damage(
                f"truncated: a chunk has {len(data):,} of {wanted:,} bytes"
                if len(data) < wanted
                else f"a chunk has more than its {wanted:,} bytes",
                sequence,
            )
        held = np.frombuffer(data, np.uint8)[:-CHECKSUM_BYTES]
        checksum = int.from_bytes(data[-CHECKSUM_BYTES:], "little")
        if int(google_crc32c.value(held)) != checksum:
            raise self.damage("checksum does not match", sequence)
        return held

    def _extents(self, extents: Any, what: str) -> tuple[int, ...]:
        right = isinstance(extents, list) and all(type(n) is int and n > 0 for n in extents)
        if not right:
            raise self.damage(f"its {what} is {_short(extents)}: whole numbers were expected")
        return tuple(extents)

    def _grid(self, metadata: Mapping[str, Any]) -> tuple[int, ...]:
        grid, encoding = metadata.get("chunk_grid"), metadata.get("chunk_key_encoding")
        if self._names([grid]) != ["regular"] or self._names([encoding]) != ["default"]:
            raise self.damage("its chunks are laid out in another way than a trace's")
        assert isinstance(grid, dict) and isinstance(encoding, dict)
        separator = (encoding.get("configuration") or {"separator": "/"}) == {"separator": "/"}
        shape = grid.get("configuration")
        if not separator or not isinstance(shape, dict):
            raise self.damage("its chunks are laid out in another way than a trace's")
        return self._extents(shape.get("chunk_shape"), "chunk shape")

    def _sharding(self, configuration: Any) -> tuple[int, ...]:
        if not isinstance(configuration, dict):
            raise self.damage("its shards have no configuration")
        self._check_codecs(configuration.get("codecs"))
        self._check_codecs(configuration.get("index_codecs"))
        if configuration.get("index_location", "end") != "end":
            raise self.damage("its shards' index is not at the end")
        return self._extents(configuration.get("chunk_shape"), "chunk shape")

    def _check_codecs(self, codecs: Any) -> None:
        names = self._names(codecs)
        if names == ["bytes"]:
            raise self.damage("its chunks have no checksum")
        if names != ["bytes", "crc32c"]:
            raise self.damage(f"its codecs are {_short(names)}, not bytes and crc32c")
        configuration = codecs[0].get("configuration") or {"endian": "little"}
        if configuration != {"endian": "little"}:
            raise self.damage("its numbers are not little-endian")

    def _names(self, named: Any) -> list[Any]:
        """Names of codecs and the like, which are dictionaries in all that retrace writes."""
        parts = named if isinstance(named, list) else []
        return [part.get("name") if isinstance(part, dict) else None for part in parts]


class Rows(_Array):
    """An array (sequence, ...) of one chunk per bundle, which is written with one."""

    def __init__(
        self, stored: Stored, name: str, dtype: np.dtype[Any], shape: tuple[int | None, ...]
    ) -> None:
        super().__init__(stored, name, dtype, shape)
        self.bundle = self._in_bundles()
        """Sequences in each chunk; the last may have fewer."""
        if self.outer != (self.bundle, *self.shape[1:]) or self.inner != self.outer:
            raise self.damage(f"its chunks are {_short(list(self.outer))}, not whole sequences")

    def read(self, sequences: Sequence[int]) -> list[npt.NDArray[Any] | DamageError | None]:
        """The rows of some sequences, or what is wrong with each; None where there is no chunk."""
        numbers = list(dict.fromkeys(sequence // self.bundle for sequence in sequences))
        chunks = self._chunks(numbers)
        rows: list[npt.NDArray[Any] | DamageError | None] = []
        for sequence in sequences:
            chunk = chunks[sequence // self.bundle]
            if isinstance(chunk, str):
                rows.append(self.damage(chunk, sequence))
            else:
                rows.append(None if chunk is None else chunk[sequence % self.bundle, ...].copy())
        return rows

    def _chunks(self, numbers: Sequence[int]) -> dict[int, npt.NDArray[Any] | str | None]:
        """Chunks (bundle, ...) by number, or what is wrong with each; None where there is none."""
        wanted = math.prod(self.outer) * self.dtype.itemsize + CHECKSUM_BYTES
        zeros = "".join("/0" for _ in self.shape[1:])
        keys = [f"{self.name}/c/{number}{zeros}" for number in numbers]
        try:
            read = self.stored.objects.first_bytes(keys, wanted + 1)
        except OSError as error:
            if len(numbers) == 1:
                return {numbers[0]: f"cannot be read: {_words(error)}"}
            # One that cannot be read stands for itself alone.
            return {number: self._chunks([number])[number] for number in numbers}
        return {
            number: None if data is None else self._decode(data, wanted)
            for number, data in zip(numbers, read, strict=True)
        }

    def _decode(self, data: bytes, wanted: int) -> npt.NDArray[Any] | str:
        try:
            held = self.verified(data, wanted)
        except DamageError as error:
            return error.cause
        if self.dtype == bool:
            return np.asarray(held.reshape(self.outer) != 0)
        return held.view(self.dtype).reshape(self.outer)


class Whole(_Array):
    """An array of one chunk, which is of no sequence."""

    def __init__(
        self, stored: Stored, name: str, dtype: np.dtype[Any], shape: tuple[int | None, ...]
    ) -> None:
        super().__init__(stored, name, dtype, shape)
        if not self.outer == self.inner == self.shape:
            raise self.damage(f"its chunks are {_short(list(self.outer))}, not one of all")

    def read(self) -> npt.NDArray[Any]:
        """All of it."""
        key = f"{self.name}/c" + "/0" * len(self.shape)
        wanted = math.prod(self.shape) * self.dtype.itemsize + CHECKSUM_BYTES
        try:
            (data,) = self.stored.objects.first_bytes([key], wanted + 1)
        except (OSError, MemoryError) as error:
            raise self.damage(f"cannot be read: {_words(error)}") from error
        if data is None:
            raise self.damage(f"missing: there is no {key}")
        return self.verified(data, wanted).view(self.dtype).reshape(self.shape)


class Tensors(_Array):
    """An array (sequence, head, position, channel) of one shard per bundle, and in it one chunk per
    sequence and head. Only where a bundle is one sequence may it be several shards along position,
    and a head in them several chunks."""

    def __init__(
        self, stored: Stored, name: str, dtype: np.dtype[Any], shape: tuple[int, int, int, int]
    ) -> None:
        super().__init__(stored, name, dtype, shape)
        self.bundle = self._in_bundles()
        """Sequences in each shard; the last may have fewer."""
        _, heads, positions, channels = shape
        length, chunk = (
            extents[2] if len(extents) == 4 else 0 for extents in (self.outer, self.inner)
        )
        if (
            self.outer != (self.bundle, heads, length, channels)
            or self.inner != (1, 1, chunk, channels)
            or chunk > positions
            or length % chunk
            or length >= positions + chunk
            or (self.bundle > 1 and not chunk == length == positions)
        ):
            raise self.damage(
                f"its shards are {_short(list(self.outer))} of {_short(list(self.inner))}: not one "
                "head in a chunk and all in a shard"
            )
        self._shard_length, self._chunk_length = length, chunk
        self._chunk_bytes = chunk * channels * dtype.itemsize + CHECKSUM_BYTES

    def read(self, sequence: int, heads: slice, length: int) -> npt.NDArray[Any]:
        """The first `length` positions of some heads (heads, length, channels) of a sequence."""
        _, count, _, channels = self.shape
        wanted = range(count)[heads]
        starts = range(0, length, self._shard_length)
        sizes = [self._shard_size(sequence, start, length) for start in starts]
        tensor = np.empty((len(wanted), length, channels), self.dtype)
        for start, size in zip(starts, sizes, strict=True):
            part = tensor[:, start : start + self._shard_length]
            self._read_shard(part, self._key(sequence, start), size, sequence, wanted)
        return tensor

    def _key(self, sequence: int, start: int) -> str:
        return f"{self.name}/c/{sequence // self.bundle}/0/{start // self._shard_length}/0"

    @property
    def _index_shape(self) -> tuple[int, int, int, int]:
        return self.bundle, self.shape[1], self._shard_length // self._chunk_length, 2

    @property
    def _index_bytes(self) -> int:
        return math.prod(self._index_shape) * 8 + CHECKSUM_BYTES

    def _shard_size(self, sequence: int, start: int, length: int) -> int:
        """Bytes of a shard, which is refused if they are not those that its positions take."""
        key = self._key(sequence, start)
        with self.readable(sequence):
            size = self.stored.objects.size(key)
        if size is None:
            raise self.damage(f"missing: there is no {key}", sequence)
        positions = min(self._shard_length, length - start)
        first = sequence - sequence % self.bundle
        sequences = min(self.bundle, self.shape[0] - first)
        chunks = sequences * self.shape[1] * -(-positions // self._chunk_length)
        wanted = chunks * self._chunk_bytes + self._index_bytes
        if size != wanted:
            cause = "truncated: " if size < wanted else ""
            raise self.damage(f"{cause}{key} has {size:,} bytes, not {wanted:,}", sequence)
        return size

    def _read_shard(
        self, part: npt.NDArray[Any], key: str, size: int, sequence: int, heads: Sequence[int]
    ) -> None:
        """Fill `part` (heads, positions, channels) from a shard of `size` bytes."""
        begin = size - self._index_bytes
        index = self._read_index(key, (begin, size), sequence)[sequence % self.bundle]
        chunks = range(-(-part.shape[1] // self._chunk_length))
        ranges: list[Range] = []
        for head in heads:
            for chunk in chunks:
                offset, count = (int(number) for number in index[head, chunk])
                if MISSING in (offset, count):
                    raise self.damage(f"missing: {key} lacks a chunk of head {head}", sequence)
                if count != self._chunk_bytes or offset + count > begin:
                    raise self.damage(f"the index of {key} names chunks that cannot be", sequence)
                ranges.append((offset, offset + count))
        with self.readable(sequence):
            read = self.stored.objects.ranges(key, ranges)
            for (row, chunk), data in zip(np.ndindex(len(heads), len(chunks)), read, strict=True):
                held = self.verified(data, self._chunk_bytes, sequence)
                numbers = held.view(self.dtype).reshape(self._chunk_length, -1)
                place = part[row, chunk * self._chunk_length : (chunk + 1) * self._chunk_length]
                place[:] = numbers[: len(place)]

    def _read_index(self, key: str, place: Range, sequence: int) -> npt.NDArray[np.uint64]:
        with self.readable(sequence):
            (data,) = self.stored.objects.ranges(key, [place])
        held = self.verified(data, self._index_bytes, sequence)
        return held.view("<u8").reshape(self._index_shape)


def _words(error: BaseException) -> str:
    """An error in one short line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _short(str(error).strip().partition("\n")[0] or type(error).__name__)


def _short(content: object) -> str:
    """What somebody wrote, in so many characters that a line can hold them."""
    text = str(content)
    return text if len(text) <= 80 else f"{text[:77]}..."
