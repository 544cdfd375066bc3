"""Kascade's anchors and maps of heads against plain NumPy in float64."""

from collections import defaultdict
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from retrace.analyze import analyze, calibrate
from retrace.analyze.methods.kascade import best_anchors
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.replay.calibration import calibration
from retrace.traces import LayerRules, RetraceError, Trace

Array = npt.NDArray[np.float64]
MakeTrace = Callable[..., Trace]
MakeRules = Callable[..., LayerRules]
LENGTH = 40
LAYERS = 4
KV_HEADS = 2


@pytest.fixture
def trace(make_trace: MakeTrace, rules: MakeRules) -> Trace:
    """Layers of 4 heads in 2 groups, normal: the last is the second with its kv heads exchanged."""
    rng = np.random.default_rng(0)

    def drawn() -> tuple[Array, ...]:
        query, key, value = (rng.normal(size=(heads, LENGTH, 8)) for heads in (4, 2, 2))
        return 2 * query, key, value

    tensors = {(layer, s): drawn() for layer in range(LAYERS - 1) for s in range(3)}
    for s in range(3):
        query, key, value = tensors[1, s]
        tensors[LAYERS - 1, s] = query[[2, 3, 0, 1]], key[::-1], value[::-1]
    return make_trace([rules(heads=4)] * LAYERS, [LENGTH] * 3, tensors=tensors)


def learn(trace: Trace, spec: str) -> dict[str, Array]:
    learned = calibration(trace, parse_spec(spec), (1, 2), (0, 2), torch.device("cpu"), False)
    assert set(learned) == {(layer, head) for layer in (0, 2) for head in range(KV_HEADS)}
    return {name: tensor.numpy() for name, tensor in learned[0, 0].items()}


def attention(trace: Trace, layer: int, sequence: int) -> Array:
    """Of each kv head's group in sum (kv heads, queries, keys)."""
    recorded = trace.layer(layer)
    queries, keys = (read(sequence).astype(np.float64) for read in (recorded.query, recorded.key))
    found = np.zeros((KV_HEADS, LENGTH, LENGTH))
    for head, query in enumerate(queries):
        weights = np.tril(np.exp(0.5 * query @ keys[head // 2].T))
        found[head // 2] += weights / weights.sum(axis=-1, keepdims=True)
    return found


def best(row: Array, k: int) -> list[int]:
    """The k largest, ties to the lower."""
    return sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]


@pytest.mark.parametrize(("layers", "count"), [(1, 1), (6, 1), (6, 3), (7, 5), (4, 9), (9, 4)])
def test_anchors_are_the_best_of_all(layers: int, count: int) -> None:
    rng = np.random.default_rng(layers)
    for _ in range(10):
        served = rng.random((layers, layers))

        def worth(chosen: tuple[int, ...], served: Array = served) -> float:
            nearest = [max(a for a in chosen if a <= layer) for layer in range(layers)]
            return float(sum(served[a, layer] for layer, a in enumerate(nearest)))

        every = [(0, *rest) for rest in combinations(range(1, layers), min(count, layers) - 1)]
        assert tuple(best_anchors(served, count)) == max(every, key=worth)
    assert best_anchors(np.ones((layers, layers)), count) == list(range(min(count, layers)))


def test_what_is_learnt(trace: Trace) -> None:
    """One query, one head and one choice at a time."""
    served = np.zeros((LAYERS, LAYERS, KV_HEADS, KV_HEADS))
    for sequence in (1, 2):
        mass = [attention(trace, layer, sequence) for layer in range(LAYERS)]
        for a in range(LAYERS):
            for b in range(a, LAYERS):
                for theirs in range(KV_HEADS):
                    for ours in range(KV_HEADS):
                        shares = []
                        for i in (9, 19, 29, 39):  # four queries, evenly spaced
                            own = mass[b][ours, i]
                            chosen = own[best(mass[a][theirs, i], 5)].sum()
                            shares.append(chosen / own[best(own, 5)].sum())
                        served[a, b, theirs, ours] += min(shares) / 2
    by_layer = served.max(axis=2).mean(axis=-1)
    for count in (1, 2, 3):
        found = learn(trace, f"kascade:anchors={count},keys=5,queries=4")
        anchors = best_anchors(by_layer, count)
        assert found["layers"].tolist() == list(range(LAYERS))
        nearest = [max(a for a in anchors if a <= layer) for layer in range(LAYERS)]
        assert found["anchor"].tolist() == nearest
        wanted = [served[a, layer].argmax(axis=0).tolist() for layer, a in enumerate(nearest)]
        assert found["heads"].tolist() == wanted


def test_finds_the_layer_and_the_heads_that_are_alike(trace: Trace) -> None:
    """What is attended in the last layer is what its own best keys are."""
    found = learn(trace, "kascade:anchors=2,keys=5")
    assert found["anchor"].tolist() == [0, 1, 1, 1]
    assert found["heads"][3].tolist() == [1, 0]
    rows = analyze(
        trace,
        ["kascade:anchors=2,keys=5", "exact:pool=sum-softmax"],
        [5],
        min_context=0,
        calibration_sequences=[1, 2],
        keep_exact=False,
    ).metrics
    rows = rows[rows.metric.isin(["recall", "attention_fraction", "error_norm"])]
    means = rows.set_index(["method", "metric", "layer", "head"])["mean"]
    kascade, exact = (means.xs(name) for name in rows["method"].unique())
    apart = (kascade - exact).abs().groupby("layer").max()
    assert (apart[[0, 1, 3]] < 1e-5).all()
    assert apart[2] > 0.1


def test_reuses_the_selection_of_the_anchor(trace: Trace, queries_of: Any) -> None:
    """One anchor, so that all layers attend what is best in the first."""
    spec = "kascade:anchors=1,keys=5"
    heads, mass = learn(trace, spec)["heads"], attention(trace, 0, 0)
    rows = analyze(
        trace, [spec], [5], min_context=0, calibration_sequences=[1, 2], keep_exact=False
    ).metrics
    found = rows.set_index(["layer", "metric", "head"])["mean"]
    for layer in (0, 2):
        figures: dict[tuple[str, int], list[float]] = defaultdict(list)
        for group in queries_of(trace, layer)[: KV_HEADS * LENGTH]:  # of the first sequence
            for query in group:
                i = query.position
                chosen = best(mass[heads[layer, query.head // 2], i, : i + 1], 5)
                for metric, figure in query.figures(chosen, 5).items():
                    figures[metric, query.head].append(figure)
        for (metric, head), own in figures.items():
            assert found[layer, metric, head] == pytest.approx(np.mean(own), abs=2e-5)


def test_bytes(trace: Trace) -> None:
    """An anchor layer reads all keys to choose; above it, only what is attended."""
    rows = analyze(
        trace,
        ["kascade:anchors=1"],
        [5],
        min_context=0,
        calibration_sequences=[1, 2],
        keep_exact=False,
    ).metrics
    found = rows.groupby(["metric", "layer"])["mean"].mean()
    apart = found["bytes_ratio"] - found["density"]  # a group attends the same keys
    np.testing.assert_allclose(apart, [0.5, 0, 0, 0], atol=1e-6)


def test_learnt_and_kept_once(make_trace: MakeTrace, rules: MakeRules) -> None:
    trace = make_trace([rules(heads=4)] * 3, [30] * 2, name="own")
    files = calibrate(trace, "kascade:anchors=2", [1])
    assert len(files) == 1
    with np.load(files[0], allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["0.anchor", "0.heads", "0.layers"]
    assert calibrate(trace, "kascade:anchors=2", [1], layers=[2]) == files
    written = files[0].stat().st_mtime_ns
    rows = analyze(trace, ["kascade:anchors=2"], [3], min_context=0, calibration_sequences=[1])
    assert set(rows.metrics["layer"]) == {0, 1, 2}
    assert list(files[0].parent.iterdir()) == files
    assert files[0].stat().st_mtime_ns == written


def test_layers_of_other_heads_cannot_be_mapped(make_trace: MakeTrace, rules: MakeRules) -> None:
    trace = make_trace([rules(heads=4), rules(heads=4, kv_heads=4)], [30] * 2)
    with pytest.raises(RetraceError, match="maps the kv heads of layers, and not all have"):
        analyze(trace, ["kascade"], [3], min_context=0, keep_exact=False)
