"""Calibration: learnt from sequences that no method is evaluated on, and kept."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from retrace.analyze import Results, analyze, calibrate, parse_spec, parse_specs
from retrace.analyze.methods.loki import Loki
from retrace.analyze.replay.calibration import calibration, calibrations
from retrace.analyze.storage.npz import read_arrays, write_arrays
from retrace.traces import RetraceError, Rotation, Trace

MakeTrace = Callable[..., Trace]


@pytest.fixture
def trace(make_trace: MakeTrace, rules: Any) -> Trace:
    """Two layers of three sequences, the test's own."""
    layer = rules(heads=4)
    return make_trace([layer, layer], [60, 50, 70], name="own")


@pytest.fixture
def learnt_from(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The sequences that each call of Loki's calibration was given."""
    calls: list[list[int]] = []
    learn = Loki.calibrate

    def watched(self: Loki, pasts: Any) -> Any:
        calls.append([past.group.sequence for past in pasts])
        return learn(self, pasts)

    monkeypatch.setattr(Loki, "calibrate", watched)
    return calls


def test_figures_of_a_calibrated_basis(
    make_trace: MakeTrace, rules: Any, tensors: Any, expected: Any, assert_figures: Any
) -> None:
    layer, rng = rules(heads=4), np.random.default_rng(3)
    evaluated, learnt = tensors(layer, 60, rng), tensors(layer, 80, rng)
    both = make_trace(layer, [60, 80], tensors={(0, 0): evaluated, (0, 1): learnt}, name="both")
    alone = make_trace(layer, [60], tensors={(0, 0): evaluated}, name="alone")
    stored = learnt[1].astype(np.float32).astype(np.float64)
    bases = [np.linalg.eigh(np.cov(k.T, bias=True))[1][:, ::-1][:, :2] for k in stored]

    def select(query: Any, k: int) -> list[int]:
        basis = bases[query.head // 2]
        return query.best((query.keys @ basis) @ (query.query @ basis), k)

    results = analyze(both, ["loki"], [4], min_context=0, keep_exact=False)
    assert results.run["calibration"] == [1]
    figures = expected(alone, select, 4, first=0, aux=lambda q: (len(q.visible) + 8) * 2 * 2)
    assert_figures(results, "loki", 4, figures)


def test_calibration_sequences_are_evaluated_for_no_method(
    trace: Trace, learnt_from: list[list[int]]
) -> None:
    results = analyze(trace, ["exact", "loki"], [2], min_context=0, calibration_sequences=[0, 2])
    assert learnt_from == [[0, 2]] * 4  # two layers of two kv heads
    assert results.run["sequences"] == [1]
    assert results.metrics["count"].unique().tolist() == [50]


def test_default_holds_out_the_last_quarter(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), [30] * 9)
    run = analyze(trace, ["loki"], [2], min_context=0, keep_exact=False).run
    assert run["calibration"] == [7, 8]
    run = analyze(trace, ["exact"], [2], min_context=0, keep_exact=False).run
    assert run["calibration"] is None and len(run["sequences"]) == 9


def test_learnt_once(trace: Trace, learnt_from: list[list[int]]) -> None:
    first = analyze(trace, ["loki"], [2], min_context=0)
    assert len(learnt_from) == 4
    kept = sorted(calibrations(trace).iterdir())
    assert len(kept) == 2 and all(file.suffix == ".npz" for file in kept)
    # How keys are selected afterwards changes nothing of what is learnt.
    again = analyze(trace, ["loki", "loki:pool=sum"], [2], min_context=0)
    assert len(learnt_from) == 4
    same = again.metrics[again.metrics.method == "loki"].reset_index(drop=True)
    np.testing.assert_array_equal(same["mean"], first.metrics["mean"])
    analyze(trace, ["loki:rank=3"], [2], min_context=0)
    assert len(learnt_from) == 8
    analyze(trace, ["loki"], [2], min_context=0, calibration_sequences=[0])
    assert len(learnt_from) == 12
    analyze(trace, ["loki"], [2], min_context=0, keep_exact=False)
    assert len(learnt_from) == 16 and len(list(calibrations(trace).iterdir())) == 6


@pytest.mark.parametrize("damage", [b"", b"PK", b"\x80\x04."])
def test_damaged_calibration_is_learnt_anew(
    trace: Trace, learnt_from: list[list[int]], damage: bytes
) -> None:
    first = calibrate(trace, "loki", layers=[0])
    first[0].write_bytes(damage)
    assert calibrate(trace, "loki", layers=[0]) == first
    assert len(learnt_from) == 4
    with np.load(first[0], allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["0.components", "1.components"]
        assert arrays["0.components"].shape == (8, 8)


def test_values_in_braces_are_calibrated_each(trace: Trace, learnt_from: list[list[int]]) -> None:
    files = calibrate(trace, "loki:rank={2,4},pool={none,sum}")
    assert len(files) == 4  # two ranks of two layers: how heads are pooled changes nothing learnt
    assert files[:2] == calibrate(trace, "loki:rank=2")
    assert len(learnt_from) == 8  # once for each rank, layer and kv head


def test_calibrate_ahead(trace: Trace, learnt_from: list[list[int]]) -> None:
    files = calibrate(trace, "loki", [1])
    assert len(files) == 2 and learnt_from == [[1]] * 4
    analyze(trace, ["loki"], [2], min_context=0, calibration_sequences=[1])
    assert len(learnt_from) == 4


def test_calibrate_again(trace: Trace, learnt_from: list[list[int]]) -> None:
    (file, other) = calibrate(trace, "loki", workers=1)
    before = {path: path.read_bytes() for path in (file, other)}
    arrays = read_arrays(file)
    assert arrays is not None
    write_arrays(file, {name: array * 2 for name, array in arrays.items()})
    learnt_from.clear()
    assert calibrate(trace, "loki", workers=1) == [file, other]
    assert not learnt_from and file.read_bytes() != before[file]
    assert calibrate(trace, "loki", again=True, workers=1) == [file, other]
    assert learnt_from == [[2]] * 4  # two layers of two kv heads
    assert {path: path.read_bytes() for path in (file, other)} == before


def test_results_of_one_folder_have_one_split(trace: Trace, tmp_path: Path) -> None:
    out = tmp_path / "results"
    analyze(trace, ["loki"], [2], min_context=0, out=out, calibration_sequences=[1])
    added = analyze(trace, ["quest"], [2], min_context=0, out=out)
    assert added.run["sequences"] == [0, 2] and added.run["calibration"] == [1]
    assert Results.load(out).run["methods"]["loki"]["calibration"]
    assert added.run["methods"]["quest"]["calibration"] is None
    other = tmp_path / "other"
    analyze(trace, ["quest"], [2], min_context=0, out=other)
    with pytest.raises(RetraceError, match="less those for calibration"):
        analyze(trace, ["loki"], [2], min_context=0, out=other)


def test_refusals(trace: Trace, make_trace: MakeTrace, rules: Any) -> None:
    single = make_trace(rules(), [60])
    with pytest.raises(RetraceError, match="has only 1 finished: capture more"):
        analyze(single, ["loki"], [2])
    for sequences, message in (
        ([7], "Calibration sequences 7: expected some of the trace's, 0, 1, 2"),
        ([0, 1, 2], "leave at least one to evaluate"),
    ):
        with pytest.raises(RetraceError, match=message):
            analyze(trace, ["loki"], [2], calibration_sequences=sequences)
    with pytest.raises(RetraceError, match="quest needs no calibration"):
        calibrate(trace, "quest")


def test_what_states_cost_is_in_the_run(trace: Trace) -> None:
    run = analyze(trace, ["loki", "exact", "loki:basis=own"], [2], min_context=0).run
    states = {method: facts["state"] for method, facts in run["methods"].items()}
    assert states["loki"]["builds"] == 2 * 2 * 2  # once a sequence, layer and kv head
    assert states["loki:basis=own"]["builds"] > 8
    assert states["exact"]["largest_bytes"] == 0  # it is the keys themselves
    assert states["loki"]["largest_bytes"] == (60 * 2 + 8 * 2) * 4


def test_any_executor_learns_the_same(trace: Trace) -> None:
    """Layer by layer, in the order of the layers and to the same bytes."""
    told: list[tuple[int, int]] = []
    one = calibrate(trace, "loki", workers=1)
    learnt = [file.read_bytes() for file in one]
    for file in one:
        file.unlink()
    with ThreadPoolExecutor(2) as executor:
        several = calibrate(trace, "loki", executor=executor, progress=lambda *at: told.append(at))
    assert several == one
    assert [file.read_bytes() for file in several] == learnt
    assert told == [(0, 2), (1, 2), (2, 2)]


CALIBRATED = [spec.name for spec in parse_specs(["all"])[0] if spec.method.calibrated]


@pytest.mark.parametrize("name", CALIBRATED)
def test_what_is_learned_is_as_the_method_says(
    make_trace: MakeTrace, rules: Any, name: str
) -> None:
    """Of every installed method: or what it keeps would be learned anew each time."""
    rotation = Rotation((1.0, 0.3))
    layer = rules(heads=4, kv_heads=2, key_dim=8, value_dim=6, rotation=rotation)
    trace = make_trace([layer, layer], [40, 30], name="own")
    trained = "steps" in parse_spec(name).parameters
    (spec,), _ = parse_specs([f"{name}:steps=1" if trained else name])
    found = calibration(trace, spec, (0, 1), (0, 1), torch.device("cpu"), keep=False)
    like = spec.method.learned_like(layer, 2)
    assert like is not None
    for own in found.values():
        assert own.keys() == like.keys()
        for known, (dtype, sizes) in like.items():
            assert own[known].dtype == dtype
            shape = own[known].shape
            assert shape == tuple(n if s is None else s for s, n in zip(sizes, shape, strict=True))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda array: array[:, :1],
        lambda array: array[None],
        lambda array: array.astype(np.float64),
        lambda array: array[:0],
    ],
    ids=["narrower", "deeper", "wider numbers", "empty"],
)
def test_what_was_kept_with_another_shape_is_learned_anew(
    make_trace: MakeTrace, rules: Any, tmp_path: Path, spoil: Callable[[Any], Any]
) -> None:
    trace = make_trace(rules(), [40, 30], name="own")

    def run(out: str) -> pd.DataFrame:
        return analyze(trace, ["loki"], [2], out=tmp_path / out, workers=1).metrics

    whole = run("a")
    (file,) = calibrations(trace).iterdir()
    before = file.read_bytes()
    arrays = read_arrays(file)
    assert arrays is not None
    write_arrays(file, arrays | {"1.components": spoil(arrays["1.components"])})
    pd.testing.assert_frame_equal(run("b"), whole)
    assert file.read_bytes() == before
