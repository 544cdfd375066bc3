"""Queries and keys of a trace as the files that vector indexes are benchmarked with."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrace.analyze.arguments import choose_device, choose_layers
from retrace.analyze.exact.top_k import top
from retrace.analyze.optional import optional
from retrace.analyze.storage.journal import Task
from retrace.analyze.units.attention import first_visible
from retrace.analyze.units.unit import HeadGroup, Unit, load_units, scores_at_once
from retrace.traces import Location, RetraceError, Trace, open_trace
from retrace.traces.progress import ShowDone
from retrace.traces.storage.durable import (
    make_folder,
    remove_all,
    sync_all,
    sync_path,
    written_whole,
)
from retrace.traces.storage.lock import check_files, check_leave, one_at_a_time

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class VectorSet:
    """The keys of one kv head of a layer and sequence, the queries of its group, and the exact
    answers by inner product."""

    group: HeadGroup
    train: Floats
    """Keys (keys, channels)."""
    test: Floats
    """Queries (queries, channels): all of the first head, then all of the next. Not scaled; the
    layer's scale turns an inner product into a logit."""
    position: Ids
    """Position of each query in the sequence (queries,)."""
    first_seen: Ids
    """The first key that each query may find (queries,): not the sequence's where the layer has a
    window or chunks."""
    seen: Ids
    """How many keys, from that one on, each query may find (queries,)."""
    neighbors: Ids
    """The best of those (queries, neighbours), ties to the lower key, -1 where there are fewer."""
    distances: Floats
    """Inner products with them, negative so that the least is the nearest; inf where none is."""

    @property
    def name(self) -> str:
        """What its file is called, after the trace."""
        group = self.group
        return (
            f"layer{group.layer}-head{group.kv_head}-sequence{group.sequence}-"
            f"{self.train.shape[1]}-dot"
        )

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All of them, by name."""
        names = ("train", "test", "neighbors", "distances", "position", "first_seen", "seen")
        return {name: getattr(self, name) for name in names}


@one_at_a_time
def export(
    trace: Trace | str | Location,
    out: str | Path,
    form: str = "ann-benchmarks",
    *,
    layers: Sequence[int] | None = None,
    kv_heads: Sequence[int] | None = None,
    sequences: Sequence[int] | None = None,
    from_position: int | None = None,
    causal: bool = False,
    neighbors: int = 100,
    device: str = "auto",
    progress: ShowDone | None = None,
) -> list[Path]:
    """Write a set of vectors for every kv head of some layers and sequences.

    The keys are those before `from_position` and the queries those from there on, which see all of
    them: an index built of a prompt and asked by what is decoded. With `causal` the keys are all of
    the sequence's, and each query may find those up to its own position only (`seen`). In a layer
    with a window or chunks a query may find only what it sees (`first_seen`), and one that sees no
    key is left out; the files of ann-benchmarks know of that only with `causal`.

    Args:
        trace: a trace or where it is: a path or a URL.
        out: folder for the files; those of the same names are replaced.
        form: `ann-benchmarks`: an HDF5 file for each set that its runner reads, with the arrays of
            `equal_norms`; `fvecs`: a folder for each, of base.fvecs, query.fvecs,
            groundtruth.ivecs as TEXMEX defines them (Jegou, Douze and Schmid 2011), and the rest as
            .npy; `numpy`: a folder for each, of .npy files.
        layers: indices of layers; all recorded ones if None.
        kv_heads: of each layer; all if None.
        sequences: all finished ones if None.
        from_position: half of each sequence if None.
        causal: whether keys since then are there as well.
        neighbors: exact answers to each query.
        device: `cpu`, `cuda`, `cuda:N` or `auto`.
        progress: told how many layers of sequences are done, and of how many.

    Returns:
        The files or folders, in order.

    Raises:
        RetraceError: a layer, head or sequence that is not there, a position that leaves no keys or
            no queries, a layer whose window a file cannot express, or a missing library.
    """
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    if form not in WRITERS:
        raise RetraceError(f"There is no format {form!r}: choose {', '.join(WRITERS)}.")
    if neighbors < 1:
        raise RetraceError(f"{neighbors} neighbours: expected 1 or more.")
    chosen = trace.sequences if sequences is None else tuple(sorted(set(sequences)))
    if missing := [s for s in chosen if s not in trace.sequences]:
        there = ", ".join(map(str, trace.sequences))
        raise RetraceError(f"There is no sequence {missing[0]}; there are {there}.")
    target, write, folder = choose_device(device), WRITERS[form], Path(out)
    tasks = [(i, s) for i in choose_layers(trace, layers) for s in chosen]
    if form == "ann-benchmarks" and not causal:
        _check_all_seen(trace, tasks)
    make_folder(folder)
    check_leave(folder)
    if form == "ann-benchmarks":
        check_files(folder, [file.name for file in folder.glob("*.hdf5")])
    written = []
    for done, (layer, sequence) in enumerate(tasks):
        if progress is not None:
            progress(done, len(tasks))
        for unit in _units(trace, layer, sequence, kv_heads, target):
            vectors = vector_set(unit, from_position, causal, neighbors)
            written.append(write(vectors, folder / f"{trace.path.stem}-{vectors.name}"))
    if progress is not None:
        progress(len(tasks), len(tasks))
    return written


def _check_all_seen(trace: Trace, tasks: Sequence[Task]) -> None:
    """Refuse layers of which some query does not see all keys before it: an index that is asked
    without more words finds any of them."""
    narrow = {
        layer
        for layer, sequence in tasks
        if trace.layer(layer).rules.first_visible(int(trace.query_positions(sequence)[-1]))
    }
    if narrow:
        wide = ",".join(str(i) for i in trace.layers if i not in narrow)
        cure = f"other layers (--layers {wide})" if wide else "a trace of other layers"
        named = ", ".join(map(str, sorted(narrow)))
        have = f"Layer {named} has" if len(narrow) == 1 else f"Layers {named} have"
        raise RetraceError(
            f"{have} a window or chunks, so queries see other keys each, and ann-benchmarks asks "
            "for the best of all: choose --format numpy or fvecs, which say what each sees, or "
            f"{cure}."
        )


def _units(
    trace: Trace, layer: int, sequence: int, kv_heads: Sequence[int] | None, device: torch.device
) -> Iterator[Unit]:
    there = trace.layer(layer).rules.kv_heads
    if kv_heads is not None and (absent := [h for h in kv_heads if not 0 <= h < there]):
        raise RetraceError(f"Layer {layer} has {there} kv heads, and none is {absent[0]}.")
    for unit in load_units(trace.layer(layer), sequence, device):
        if kv_heads is None or unit.group.kv_head in kv_heads:
            yield unit


def vector_set(unit: Unit, from_position: int | None, causal: bool, neighbors: int) -> VectorSet:
    """The set of one kv head; see `export`."""
    length = len(unit.keys)
    first = length // 2 if from_position is None else from_position
    row = int(torch.searchsorted(unit.positions, first))
    if not 0 < first < length or row == len(unit.positions):
        raise RetraceError(
            f"Position {first} of sequence {unit.group.sequence}, which has {length}, leaves no "
            "keys or no queries: choose another with from_position."
        )
    keys = unit.keys if causal else unit.keys[:first]
    begin, end = first_visible(unit.positions, unit.group.rules), unit.positions + 1
    end = end if causal else end.clamp(max=first)
    asking = (unit.positions >= first) & (begin < end)
    if not bool(asking.any()):
        raise RetraceError(
            f"No query of layer {unit.group.layer}, sequence {unit.group.sequence} from position "
            f"{first} on sees any of the keys: choose another with from_position."
        )
    queries, heads = unit.queries[:, asking], len(unit.queries)
    positions, begin, end = (part[asking].repeat(heads) for part in (unit.positions, begin, end))
    products, ids = _nearest(queries.flatten(0, 1), keys, begin, end, neighbors)
    return VectorSet(
        unit.group,
        keys.cpu().numpy(),
        queries.flatten(0, 1).cpu().numpy(),
        positions.cpu().numpy().astype(np.int32),
        begin.cpu().numpy().astype(np.int32),
        (end - begin).cpu().numpy().astype(np.int32),
        ids.cpu().numpy().astype(np.int32),
        -products.cpu().numpy().astype(np.float32),
    )


def _nearest(
    queries: Tensor, keys: Tensor, begin: Tensor, end: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Inner products (queries, count) float64 with the best of the keys from `begin` to `end`
    (queries,), and which keys these are; -inf and -1 where there are fewer.

    In float64, so that rounding to float32 orders no two keys.
    """
    wide, places = keys.double(), torch.arange(len(keys), device=keys.device)
    rows = max(1, scores_at_once(keys.device) // len(keys))
    found = []
    for start in range(0, len(queries), rows):
        some = slice(start, start + rows)
        hidden = (places < begin[some, None]) | (places >= end[some, None])
        products = queries[some].double() @ wide.T
        found.append(top(products.masked_fill_(hidden, -torch.inf), count))
    return torch.cat([products for products, _ in found]), torch.cat([ids for _, ids in found])


def equal_norms(vectors: VectorSet) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a set, so changed that the nearest keys by angle are those of largest inner
    product.

    One further channel gives all keys the norm of the largest, and is 0 in queries: as
    ann-benchmarks makes lastfm-64-dot, after Bachrach et al., Speeding Up the Xbox Recommender
    System Using a Euclidean Transformation for Inner-Product Spaces (2014). Distances are
    1 - cosine. The channel is rounded to float32, which moves a cosine by less than one part in
    2^23.
    """
    norms = np.linalg.norm(vectors.train.astype(np.float64), axis=1)
    queries = np.linalg.norm(vectors.test.astype(np.float64), axis=1)
    rest = np.sqrt(norms.max() ** 2 - norms**2).astype(np.float32)
    both = np.maximum(norms.max() * queries, np.finfo(np.float32).tiny)[:, None]
    return vectors.arrays() | {
        "train": np.column_stack([vectors.train, rest]),
        "test": np.pad(vectors.test, ((0, 0), (0, 1))),
        "distances": (1 + vectors.distances / both).astype(np.float32),
    }


def _facts(vectors: VectorSet) -> dict[str, Any]:
    group = vectors.group
    return {
        "distance": "dot",
        "layer": group.layer,
        "kv_head": group.kv_head,
        "heads": group.rules.group,
        "sequence": group.sequence,
        "scale": group.rules.scale,
    }


def _write_hdf5(vectors: VectorSet, place: Path) -> Path:
    h5py = optional("h5py", "pip install 'retrace-attention[export]'", "An HDF5 file")
    arrays, file = equal_norms(vectors), place.with_name(f"{place.name}.hdf5")
    layout = {"type": "dense", "point_type": "float", "dimension": arrays["train"].shape[1]}
    # In memory: the library ends the process where a disk is full.
    with h5py.File(file.name, "w", driver="core", backing_store=False) as held:
        held.attrs.update(_facts(vectors) | layout | {"distance": "angular"})
        for name, array in arrays.items():
            held.create_dataset(name, data=array)
        held.flush()
        content = held.id.get_file_image()
    with written_whole(file) as opened:
        opened.write(content)
    return file


def _write_fvecs(vectors: VectorSet, place: Path) -> Path:
    named = {"train": "base.fvecs", "test": "query.fvecs", "neighbors": "groundtruth.ivecs"}

    def write(folder: Path) -> None:
        for name, array in vectors.arrays().items():
            if name in named:
                width = np.full((len(array), 1), array.shape[1], np.int32)
                np.hstack([width, array.view(np.int32)]).tofile(folder / named[name])
            else:
                np.save(folder / f"{name}.npy", array)

    return _folder(vectors, place, write)


def _write_numpy(vectors: VectorSet, place: Path) -> Path:
    def write(folder: Path) -> None:
        for name, array in vectors.arrays().items():
            np.save(folder / f"{name}.npy", array)

    return _folder(vectors, place, write)


def _folder(vectors: VectorSet, place: Path, write: Callable[[Path], None]) -> Path:
    """A folder that is there whole and for good, or not at all."""
    aside = place.with_name(f".{place.name}.partial")
    remove_all(aside)
    aside.mkdir()
    try:
        write(aside)
        (aside / "facts.json").write_text(json.dumps(_facts(vectors), indent=2) + "\n")
        sync_all(aside)
        remove_all(place)
        aside.replace(place)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_path(place.parent)
    return place


WRITERS: dict[str, Callable[[VectorSet, Path], Path]] = {
    "ann-benchmarks": _write_hdf5,
    "fvecs": _write_fvecs,
    "numpy": _write_numpy,
}
"""How a set is written, by format."""
