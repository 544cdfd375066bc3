"""Queries and keys as vector-search benchmarks read them, against plain inner products."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.analyze.commands.export import export
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
NEIGHBORS = 7
FIRST = 30


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    """A layer with a softcap and sinks, neither of which is a matter of vectors."""
    kind = rules(heads=4, kv_heads=2, softcap=4.0, sinks=(0.5, -1.0, 2.0, 4.0))
    return make_trace([kind, kind], [53, 47])


def expected(trace: Trace, layer: int, kv_head: int, sequence: int, causal: bool) -> Any:
    """Keys, queries, best keys and inner products, one query at a time in float64."""
    tensors = trace.layer(layer)
    keys = np.asarray(tensors.key(sequence), np.float64)[kv_head]
    queries = np.asarray(tensors.query(sequence), np.float64)[2 * kv_head : 2 * kv_head + 2]
    ids, products = [], []
    for head in queries:
        for position in range(FIRST, len(keys)):
            seen = keys[: position + 1 if causal else FIRST]
            dots = seen @ head[position]
            best = sorted(range(len(dots)), key=lambda j: (-dots[j], j))[:NEIGHBORS]
            ids.append(best)
            products.append(dots[best])
    return (keys if causal else keys[:FIRST]), queries[:, FIRST:].reshape(-1, 8), ids, products


def read(form: str, file: Path) -> dict[str, Any]:
    """What each format's own readers make of a set."""
    if form == "ann-benchmarks":
        h5py = pytest.importorskip("h5py", reason="needs the export extra")
        with h5py.File(file, "r") as opened:
            assert opened.attrs["distance"] == "angular"
            assert opened.attrs["dimension"] == opened["train"].shape[1] == opened["test"].shape[1]
            return {name: array[:] for name, array in opened.items()}
    arrays = {path.stem: np.load(path) for path in file.glob("*.npy")}
    if form == "fvecs":
        for name, path in (("train", "base.fvecs"), ("test", "query.fvecs")):
            vectors = np.fromfile(file / path, np.float32).reshape(-1, 9)
            assert (vectors[:, 0].view(np.int32) == 8).all()
            arrays[name] = vectors[:, 1:]
        truth = np.fromfile(file / "groundtruth.ivecs", np.int32).reshape(-1, NEIGHBORS + 1)
        assert (truth[:, 0] == NEIGHBORS).all()
        arrays["neighbors"] = truth[:, 1:]
    assert json.loads((file / "facts.json").read_text())["scale"] == 0.5
    return arrays


@pytest.mark.parametrize("causal", [False, True], ids=["prefix", "causal"])
@pytest.mark.parametrize("form", ["ann-benchmarks", "fvecs", "numpy"])
def test_sets(trace: Trace, tmp_path: Path, form: str, causal: bool) -> None:
    options: dict[str, Any] = {"from_position": FIRST, "causal": causal, "neighbors": NEIGHBORS}
    for _ in range(2):  # what is there is replaced
        files = export(trace, tmp_path, form, layers=[1], kv_heads=[1], **options)
    assert len(files) == 2 == len(list(tmp_path.iterdir()))
    for sequence, file in enumerate(files):
        found = read(form, file)
        keys, queries, ids, products = expected(trace, 1, 1, sequence, causal)
        distances = -np.array(products)
        if form == "ann-benchmarks":  # one further channel: keys of one norm, 0 in queries
            norms = np.linalg.norm(found["train"], axis=1)
            largest = np.linalg.norm(keys, axis=1).max()
            np.testing.assert_allclose(norms, largest, rtol=1e-6)
            assert not found["test"][:, -1].any()
            found["train"], found["test"] = found["train"][:, :-1], found["test"][:, :-1]
            distances = 1 + distances / (largest * np.linalg.norm(queries, axis=1)[:, None])
        np.testing.assert_array_equal(found["train"], keys)
        np.testing.assert_array_equal(found["test"], queries)
        np.testing.assert_array_equal(found["neighbors"], ids)
        np.testing.assert_allclose(found["distances"], distances, rtol=1e-6, atol=1e-7)
        length = trace.length(sequence)
        positions = np.tile(np.arange(FIRST, length), 2)
        np.testing.assert_array_equal(found["position"], positions)
        np.testing.assert_array_equal(found["seen"], positions + 1 if causal else FIRST)
        assert not found["first_seen"].any()


@pytest.mark.parametrize("causal", [False, True], ids=["prefix", "causal"])
@pytest.mark.parametrize("layer", [{"window": 9}, {"chunk": 16}, {"window": 20, "chunk": 48}])
@pytest.mark.parametrize("form", ["ann-benchmarks", "fvecs", "numpy"])
def test_a_query_finds_what_it_sees(
    make_trace: MakeTrace, rules: Any, tmp_path: Path, form: str, layer: Any, causal: bool
) -> None:
    layers = [rules(heads=4, kv_heads=2), rules(heads=4, kv_heads=2, **layer)]
    trace, first = make_trace(layers, [53]), 25
    options: dict[str, Any] = {"from_position": first, "causal": causal, "neighbors": NEIGHBORS}
    if form == "ann-benchmarks" and not causal:
        with pytest.raises(RetraceError, match=r"^Layer 1 has a window .*--layers 0\)\.$"):
            export(trace, tmp_path / "v", form, **options)
        assert not (tmp_path / "v").exists()
        assert len(export(trace, tmp_path / "v", form, layers=[0], **options)) == 2
        return
    [file] = export(trace, tmp_path / "v", form, layers=[1], kv_heads=[1], **options)
    found, tensors = read(form, file), trace.layer(1)
    keys = np.asarray(tensors.key(0), np.float64)[1]
    asked = []
    for head in np.asarray(tensors.query(0), np.float64)[2:4]:
        for position in range(first, 53):
            visible = [
                j
                for j in range(position + 1 if causal else first)
                if j > position - layer.get("window", 99)
                and j >= position - position % layer.get("chunk", 99)
            ]
            best = sorted(visible, key=lambda j: (-(keys[j] @ head[position]), j))[:NEIGHBORS]
            if visible:
                asked.append((position, visible[0], len(visible), best))
    assert len(asked) == len(found["position"]) == len(found["test"])
    for row, (position, begin, count, best) in enumerate(asked):
        assert found["position"][row] == position
        assert (found["first_seen"][row], found["seen"][row]) == (begin, count)
        assert [i for i in found["neighbors"][row] if i >= 0] == best


def test_no_query_sees_a_key(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    trace = make_trace(rules(chunk=20), [53])
    with pytest.raises(RetraceError, match="No query of layer 0, sequence 0 from position 40 on"):
        export(trace, tmp_path, "numpy", from_position=40)


def test_fewer_keys_than_neighbors(trace: Trace, tmp_path: Path) -> None:
    [file] = export(
        trace, tmp_path, "numpy", layers=[0], kv_heads=[0], sequences=[0], from_position=3
    )
    found = read("numpy", file)
    assert found["neighbors"].shape[1] == 100
    assert (found["neighbors"][:, 3:] == -1).all()
    assert np.isposinf(found["distances"][:, 3:]).all()


HEADS, KEYS, LATER, FOUND = 2, 300, 40, 10


@pytest.fixture
def apart(make_trace: MakeTrace, rules: Any) -> Trace:
    """Keys of unlike norms that do not tie, and then some that no query wants: what there is to
    find is the same in the trace as among the keys of a file."""
    layer, rng = rules(heads=HEADS, kv_heads=1), np.random.default_rng(0)
    query, key, value = (rng.normal(size=(n, KEYS + LATER, 8)) for n in (HEADS, 1, 1))
    key *= rng.lognormal(size=(KEYS + LATER, 1))
    query[..., 0] = np.abs(query[..., 0]) + 1
    key[:, KEYS:] = (-100.0, *[0.0] * 7)
    return make_trace(layer, [KEYS + LATER], tensors={(0, 0): (query, key, value)})


@pytest.fixture
def file(apart: Trace, tmp_path: Path) -> dict[str, Any]:
    """The HDF5 file of these keys and the queries since."""
    pytest.importorskip("h5py", reason="needs the export extra")
    [written] = export(apart, tmp_path / "v", from_position=KEYS, neighbors=FOUND)
    return read("ann-benchmarks", written)


def test_the_nearest_by_angle_are_those_of_largest_product(file: dict[str, Any]) -> None:
    """As ann-benchmarks defines `angular`, over what the file holds, but for keys whose products
    are as close as float32 can tell apart."""
    keys, queries = file["train"].astype(np.float64), file["test"].astype(np.float64)
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(keys, axis=1)
    products = queries @ keys.T
    angles = 1 - products / norms
    nearest = np.argsort(angles, axis=1, kind="stable")[:, :FOUND]
    close = 2**-23 * norms.max(axis=1, keepdims=True)
    there, found = (np.take_along_axis(products, i, 1) for i in (file["neighbors"], nearest))
    assert (np.abs(there - found) <= close).all()
    clear = np.diff(np.sort(-products, axis=1)[:, : FOUND + 1]).min(axis=1) > close[:, 0]
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(nearest[clear], file["neighbors"][clear])
    np.testing.assert_allclose(
        file["distances"], np.take_along_axis(angles, nearest, 1), rtol=0, atol=1e-6
    )


def recall(ids: Any, file: dict[str, Any]) -> Any:
    """Recall of every head's queries."""
    pairs = zip(ids, file["neighbors"], strict=True)
    hits = np.array([len(set(ours) & set(theirs)) / FOUND for ours, theirs in pairs])
    return hits.reshape(HEADS, -1).mean(axis=1)


def test_angular_searches_find_them(file: dict[str, Any]) -> None:
    """The keys as ann-benchmarks' own modules hand them to the libraries."""
    keys, queries = file["train"], file["test"]
    hnswlib: Any = pytest.importorskip("hnswlib", reason="hnswlib is not installed")
    index = hnswlib.Index(space="cosine", dim=keys.shape[1])
    index.init_index(len(keys), ef_construction=KEYS, M=16)
    index.set_ef(KEYS)
    index.add_items(keys, num_threads=1)
    assert (recall(index.knn_query(queries, FOUND)[0], file) > 0.999).all()
    faiss: Any = pytest.importorskip("faiss", reason="faiss is not installed")
    flat = faiss.IndexFlatL2(keys.shape[1])
    flat.add(keys / np.linalg.norm(keys, axis=1, keepdims=True))
    units = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    assert (recall(flat.search(units, FOUND)[1], file) > 0.999).all()


@pytest.mark.parametrize("spec", ["flat", "hnsw:m=4,ef=4", "hnswlib:m=4,ef=4,ef_construction=8"])
def test_a_library_finds_as_much_of_a_file_as_the_results_say(
    apart: Trace, file: dict[str, Any], spec: str
) -> None:
    """The library's own index and search by inner product over the file's keys, less the further
    channel, beside what `analyze` gives for the method whose state is built from the same keys."""
    library = "hnswlib" if spec.startswith("hnswlib") else "faiss"
    module: Any = pytest.importorskip(library, reason=f"{library} is not installed")
    keys, queries = (np.ascontiguousarray(file[name][:, :8]) for name in ("train", "test"))
    if library == "hnswlib":
        index = module.Index(space="ip", dim=8)
        index.init_index(KEYS, M=4, ef_construction=8, random_seed=100)
        index.set_ef(FOUND)
        index.add_items(keys, num_threads=1)
        ids = index.knn_query(queries, FOUND)[0]
    else:
        hnsw = spec.startswith("hnsw")
        index = module.IndexFlatIP(8)
        if hnsw:
            index = module.IndexHNSWFlat(8, 4, module.METRIC_INNER_PRODUCT)
            index.hnsw.efSearch = FOUND
        index.add(keys)
        ids = index.search(queries, FOUND)[1]
    results = analyze(
        apart,
        [f"{spec},step=999" if ":" in spec else f"{spec}:step=999"],
        [FOUND],
        protocol=f"prefix:{KEYS}",
        min_context=0,
        keep_exact=False,
    )
    rows = results.metrics[results.metrics["metric"] == "recall"].sort_values("head")
    assert (rows["count"] == LATER).all()
    np.testing.assert_allclose(rows["mean"], recall(ids, file), rtol=1e-6)
    assert (rows["mean"] == 1).all() if spec == "flat" else (rows["mean"] < 1).all()


def test_mistakes(trace: Trace, tmp_path: Path) -> None:
    for words, options in {
        "no format": {"form": "csv"},
        "leaves no keys or no queries": {"from_position": 60},
        "no sequence 5": {"sequences": [5]},
        "has 2 kv heads": {"kv_heads": [2]},
        "has no layer 7": {"layers": [7]},
    }.items():
        with pytest.raises(RetraceError, match=words):
            export(trace, tmp_path, **{"form": "numpy", **options})
