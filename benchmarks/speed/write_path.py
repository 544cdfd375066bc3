"""How fast the tensors of a layer reach the disk, by what writes them and in which layout.

    python -m benchmarks.speed.write_path --folder . --out table.md

Compared are zarr-python with its own codecs and with those of `zarrs` (where that package is
there), tensorstore (likewise), the shards that `TraceWriter` puts together itself, and a plain
file without any format as the bound. One array is one layer's queries, one sequence after another;
each thread writes sequences of its own. All is written to the same file system in one run, files
are flushed to the disk (fsync) where the row says so, and the best of `--repeat` counts.
"""

import argparse
import concurrent.futures
import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from benchmarks import page
from benchmarks.machine import processor
from retrace.traces.storage.shards import write_shards

SHAPES = {
    "8B-shaped, (32, 8192, 128)": ((32, 8192, 128), 12),
    "SmolLM2, (9, 2048, 64)": ((9, 2048, 64), 96),
}
"""(heads, positions, channels) of a tensor, and how many of them are written."""
CODECS: dict[str, tuple[Any, ...]] = {
    "none": (),
    "crc32c": (Crc32cCodec(),),
    "zstd": (ZstdCodec(level=1),),
    "blosc": (BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"),),
}

Write = Callable[[int], None]


def main() -> None:
    """Measure, print a table, and write it where asked."""
    arguments = _parse()
    folder = arguments.folder / "write-path"
    lines = []
    for title, (shape, count) in SHAPES.items():
        tensor = np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16)
        rows = []
        for name, make in _writers(tensor, count).items():
            rates = []
            for threads in arguments.threads:
                best = float("inf")
                for _ in range(arguments.repeat):
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir(parents=True)
                    best = min(best, _time(make(folder), count, threads))
                rates.append(tensor.nbytes * count / best / 1e6)
            rows.append((name, rates))
            print(f"{title}: {name}: {', '.join(f'{rate:,.0f}' for rate in rates)} MB/s")
        shutil.rmtree(folder, ignore_errors=True)
        lines += _table(title, rows, arguments.threads)
    heading = f"{processor()}, {os.cpu_count()} cores, MB/s."
    page.publish("\n".join([heading, "", *lines]), arguments.out)


def _parse() -> argparse.Namespace:
    parser = page.parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to measure")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeat", type=int, default=2)
    return parser.parse_args()


def _writers(tensor: np.ndarray[Any, Any], count: int) -> dict[str, Callable[[Path], Write]]:
    """What writes sequence number i, made in a folder; by name."""
    writers: dict[str, Callable[[Path], Write]] = {
        "plain file": lambda folder: _plain(folder, tensor, sync=False),
        "plain file, fsync": lambda folder: _plain(folder, tensor, sync=True),
        "retrace shard, crc32c": lambda folder: _own(folder, tensor, count),
        "zarr-python, crc32c, no shards": lambda folder: _zarr(
            folder, tensor, count, "crc32c", sharded=False
        ),
    }
    for codec in CODECS:
        writers[f"zarr-python, {codec}"] = lambda folder, codec=codec: _zarr(
            folder, tensor, count, codec
        )
    if importlib.util.find_spec("zarrs"):
        for codec in ("none", "crc32c", "zstd"):
            writers[f"zarrs, {codec}"] = lambda folder, codec=codec: _zarr(
                folder, tensor, count, codec, pipeline="zarrs.ZarrsCodecPipeline"
            )
    if importlib.util.find_spec("tensorstore"):
        for codec in ("none", "crc32c"):
            writers[f"tensorstore, {codec}"] = lambda folder, codec=codec: _tensorstore(
                folder, tensor, count, codec
            )
    return writers


def _time(write: Write, count: int, threads: int) -> float:
    begun = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(count)))
    return time.perf_counter() - begun


def _plain(folder: Path, tensor: np.ndarray[Any, Any], *, sync: bool) -> Write:
    def write(sequence: int) -> None:
        with (folder / str(sequence)).open("wb", buffering=0) as file:
            file.write(memoryview(tensor.view(np.uint8)).cast("B"))
            if sync:
                os.fsync(file.fileno())

    return write


def _own(folder: Path, tensor: np.ndarray[Any, Any], count: int) -> Write:
    array = _create(folder, tensor, count, "crc32c", sharded=True)
    return lambda sequence: write_shards(array, sequence, tensor)


def _zarr(
    folder: Path,
    tensor: np.ndarray[Any, Any],
    count: int,
    codec: str,
    *,
    sharded: bool = True,
    pipeline: str = "zarr.core.codec_pipeline.BatchedCodecPipeline",
) -> Write:
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        array = _create(folder, tensor, count, codec, sharded=sharded)

    def write(sequence: int) -> None:
        array[sequence] = tensor

    return write


def _create(
    folder: Path, tensor: np.ndarray[Any, Any], count: int, codec: str, *, sharded: bool
) -> "zarr.Array[Any]":
    return zarr.create_array(
        folder / "a.zarr",
        shape=(count, *tensor.shape),
        chunks=(1, 1, *tensor.shape[1:]),
        shards=(1, *tensor.shape) if sharded else None,
        dtype=tensor.dtype,
        compressors=CODECS[codec] or None,
    )


def _tensorstore(folder: Path, tensor: np.ndarray[Any, Any], count: int, codec: str) -> Write:
    import tensorstore

    inner = [{"name": "bytes", "configuration": {"endian": "little"}}]
    inner += [{"name": codec}] if codec != "none" else []
    store = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str((folder / "a.zarr").resolve())},
            "metadata": {
                "shape": [count, *tensor.shape],
                "data_type": "bfloat16",
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [1, *tensor.shape]},
                },
                "codecs": [
                    {
                        "name": "sharding_indexed",
                        "configuration": {
                            "chunk_shape": [1, 1, *tensor.shape[1:]],
                            "codecs": inner,
                            "index_codecs": [inner[0], {"name": "crc32c"}],
                        },
                    }
                ],
            },
        },
        create=True,
    ).result()

    def write(sequence: int) -> None:
        store[sequence].write(tensor).result()

    return write


def _table(title: str, rows: list[tuple[str, list[float]]], threads: list[int]) -> list[str]:
    bound = dict(rows)["plain file"]
    head = [f"{n} thread{'s' if n > 1 else ''}" for n in threads]
    lines = [f"| {title} | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    for name, rates in rows:
        cells = [f"{r:,.0f} ({r / b:.2f})" for r, b in zip(rates, bound, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
