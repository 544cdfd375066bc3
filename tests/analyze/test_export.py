"""Queries and keys as vector-search benchmarks read them, against plain inner products."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze.export import export
from retrace.analyze.methods.registry import parse_spec
from retrace.analyze.past import Past
from retrace.analyze.unit import load_units
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
NEIGHBORS = 7
FIRST = 30


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    """A layer with a window, a softcap and sinks, none of which is a matter of vectors."""
    kind = rules(heads=4, kv_heads=2, window=9, softcap=4.0, sinks=(0.5, -1.0, 2.0, 4.0))
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
            assert opened.attrs["distance"] == "dot"
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
        np.testing.assert_array_equal(found["train"], keys)
        np.testing.assert_array_equal(found["test"], queries)
        np.testing.assert_array_equal(found["neighbors"], ids)
        np.testing.assert_allclose(found["distances"], -np.array(products), rtol=1e-6)
        length = trace.length(sequence)
        positions = np.tile(np.arange(FIRST, length), 2)
        np.testing.assert_array_equal(found["position"], positions)
        np.testing.assert_array_equal(found["seen"], positions + 1 if causal else FIRST)


def test_fewer_keys_than_neighbors(trace: Trace, tmp_path: Path) -> None:
    [file] = export(
        trace, tmp_path, "numpy", layers=[0], kv_heads=[0], sequences=[0], from_position=3
    )
    found = read("numpy", file)
    assert found["neighbors"].shape[1] == 100
    assert (found["neighbors"][:, 3:] == -1).all()
    assert np.isposinf(found["distances"][:, 3:]).all()


@pytest.mark.parametrize(
    ("spec", "library"),
    [
        ("flat", "faiss"),
        ("hnsw:m=4,ef_construction=8,ef=8", "faiss"),
        ("hnswlib:m=4,ef_construction=8,ef=8", "hnswlib"),
    ],
)
def test_an_index_finds_as_much_of_a_file_as_in_a_replay(
    trace: Trace, tmp_path: Path, spec: str, library: str
) -> None:
    """The library itself over the HDF5 file, and our method over the trace."""
    pytest.importorskip("h5py", reason="needs the export extra")
    module: Any = pytest.importorskip(library, reason=f"{library} is not installed")
    [file] = export(
        trace, tmp_path, layers=[0], kv_heads=[0], sequences=[0], from_position=40, neighbors=5
    )
    found = read("ann-benchmarks", file)
    if spec == "flat":
        index = module.IndexFlatIP(8)
        index.add(found["train"])
        theirs = index.search(found["test"], 5)[1]
    elif library == "faiss":
        index = module.IndexHNSWFlat(8, 4, module.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 8, 8
        index.add(found["train"])
        theirs = index.search(found["test"], 5)[1]
    else:
        index = module.Index(space="ip", dim=8)
        index.init_index(40, ef_construction=8, M=4, random_seed=100)
        index.set_ef(8)
        index.add_items(found["train"], num_threads=1)
        theirs = index.knn_query(found["test"], 5)[0]
    unit = next(load_units(trace.layer(0), 0, torch.device("cpu")))
    method: Any = parse_spec(spec).method
    queries = unit.queries[:, 40:] * unit.group.rules.scale
    ours = method.search(method.build(Past(unit, 0, 40)), queries, 5).flatten(0, 1).numpy()

    def recall(ids: Any) -> float:
        pairs = zip(ids, found["neighbors"], strict=True)
        return float(np.mean([len(set(a) & set(b)) / 5 for a, b in pairs]))

    assert recall(theirs) == pytest.approx(recall(ours), abs=0.02) and recall(ours) > 0.6


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
