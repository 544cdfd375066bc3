"""Drift of a run with a method in the loop, against a plain computation from both traces."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import Drift, compare
from retrace.analyze.methods.specs import parse_spec
from retrace.analyze.outputs.plots.drift import draw_drift
from retrace.analyze.replay.approximation import Approximation
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]
TOLD = {
    "method": "window:keep=recent:1",
    "parameters": {},
    "topk": 5,
    "from_position": None,
    "dense_layers": [],
    "calibration": [],
}


@pytest.fixture
def pair(make_trace: MakeTrace, rules: Any, tensors: Any) -> tuple[Trace, Trace, dict[Any, Any]]:
    """An exact trace and one that says a window of five keys was in the loop."""
    layer, rng = rules(heads=4, kv_heads=2), np.random.default_rng(1)
    lengths = (40, 33)
    exact = {(i, s): tensors(layer, n, rng) for i in range(2) for s, n in enumerate(lengths)}
    moved = {
        place: tuple(t + 0.1 * rng.normal(size=t.shape).astype(t.dtype) for t in of)
        for place, of in exact.items()
    }
    traces = [
        make_trace([layer, layer], lengths, tensors=given, name=name)
        for name, given in (("exact", exact), ("run", moved))
    ]
    say(traces[0], {"max_length": 40})
    say(traces[1], {"max_length": 40, "approximation": TOLD})
    from retrace.traces import open_trace

    return open_trace(traces[0].path), open_trace(traces[1].path), {"exact": exact, "run": moved}


def say(trace: Trace, capture: dict[str, Any]) -> None:
    """Put what was captured into a trace's attributes."""
    file = Path(str(trace.path)) / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["attributes"]["capture"] = capture
    metadata.pop("consolidated_metadata", None)
    file.write_text(json.dumps(metadata))


def window(q: Any, k: Any, v: Any, scale: float, width: int) -> np.ndarray:
    """Attention of one head over the last `width` keys, in float64."""
    scores = scale * q.astype(np.float64) @ k.astype(np.float64).T
    i, j = np.arange(len(q))[:, None], np.arange(len(k))
    scores[(j > i) | (j <= i - width)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v.astype(np.float64)


def test_against_a_plain_computation(pair: tuple[Trace, Trace, dict[Any, Any]]) -> None:
    exact, run, given = pair
    drift = compare(exact, [run])
    rows = drift.layers.set_index(["layer", "tensor", "metric", "head"])
    scale = exact.layer(0).rules.scale
    for layer in range(2):
        pairs: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = {}
        for sequence in range(2):
            (q, k, v), (q2, k2, v2) = (given[n][layer, sequence] for n in ("exact", "run"))
            for head in range(4):
                pairs.setdefault(("query", head), []).append((q[head], q2[head]))
                outputs = (
                    window(q[head], k[head // 2], v[head // 2], scale, 99),
                    window(q2[head], k2[head // 2], v2[head // 2], scale, 5),
                )
                pairs.setdefault(("output", head), []).append(outputs)
            for head in range(2):
                pairs.setdefault(("key", head), []).append((k[head], k2[head]))
                pairs.setdefault(("value", head), []).append((v[head], v2[head]))
        for (tensor, head), parts in pairs.items():
            x, y = (np.concatenate(side).astype(np.float64) for side in zip(*parts, strict=True))
            norms = np.linalg.norm(x, axis=-1)
            error = np.linalg.norm(y - x, axis=-1) / norms
            cosine = (x * y).sum(-1) / norms / np.linalg.norm(y, axis=-1)
            for metric, values in (("error", error), ("cosine", cosine)):
                row = rows.loc[(layer, tensor, metric, head)]
                np.testing.assert_allclose(row["mean"], values.mean(), rtol=1e-5)
                np.testing.assert_allclose(row["std"], values.std(), rtol=1e-4)
                assert row["count"] == len(values) == 73


def test_likelihoods_are_paired(pair: tuple[Trace, Trace, dict[Any, Any]], tmp_path: Path) -> None:
    exact, run, _ = pair
    drift = compare(exact, [run])
    differences = [run.nll(s) - exact.nll(s) for s in (0, 1)]
    [summary] = drift.runs.to_dict("records")
    expected = np.concatenate(differences).astype(np.float64)
    np.testing.assert_allclose(summary["difference"], np.nanmean(expected), rtol=1e-5)
    sides = sorted(float(np.nanmean(d)) for d in differences)
    # Two sequences, drawn twice: one of them twice, or both.
    np.testing.assert_allclose([summary["low"], summary["high"]], sides, rtol=1e-4)
    assert summary["run"] == "window:keep=recent:1, top-k 5"
    drift.save(tmp_path / "drift")
    assert {f.name for f in (tmp_path / "drift").iterdir()} == set(Drift.files())
    again = Drift.load(tmp_path / "drift")
    for table in Drift.TABLES:
        ours, theirs = (getattr(d, table.field) for d in (again, drift))
        pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)
    assert again.missing == drift.missing == {}
    assert all(file.stat().st_size > 10_000 for file in draw_drift(drift, tmp_path / "plots"))


@pytest.mark.parametrize("first", [1, 20, 38])
def test_what_the_exact_model_reads_is_not_counted(
    first: int, pair: tuple[Trace, Trace, dict[Any, Any]]
) -> None:
    exact, run, given = pair
    say(run, {"max_length": 40, "approximation": {**TOLD, "from_position": first}})
    drift = compare(exact.path, [run.path])
    sequences = [s for s in (0, 1) if first < exact.length(s) - 1]
    rows = drift.layers[drift.layers["metric"] == "error"]
    rows = rows.set_index(["layer", "tensor", "head"])
    for layer, place in itertools.product(range(2), range(2)):
        tensor = ("query", "key")[place]
        x, y = (
            np.concatenate([given[n][layer, s][place][1, first:] for s in sequences]).astype(float)
            for n in ("exact", "run")
        )
        errors = np.linalg.norm(y - x, axis=-1) / np.linalg.norm(x, axis=-1)
        assert rows.loc[(layer, tensor, 1), "count"] == len(errors)
        np.testing.assert_allclose(rows.loc[(layer, tensor, 1), "mean"], errors.mean(), rtol=1e-5)
        assert rows.loc[(layer, "output", 1), "count"] == len(errors)
    after, before = (
        np.concatenate([t.nll(s)[first:-1] for s in sequences]).astype(float) for t in (run, exact)
    )
    [summary] = drift.runs.to_dict("records")
    np.testing.assert_allclose(summary["difference"], (after - before).mean(), rtol=1e-6)
    np.testing.assert_allclose(summary["perplexity"], np.exp(after.mean()), rtol=1e-6)
    assert drift.likelihoods["position"].min() == first


def test_a_method_that_begins_after_the_end(pair: tuple[Trace, Trace, dict[Any, Any]]) -> None:
    exact, run, _ = pair
    say(run, {"max_length": 40, "approximation": {**TOLD, "from_position": 39}})
    with pytest.raises(RetraceError, match="no sequence in which its method predicts"):
        compare(exact.path, [run.path])


def test_what_is_no_pair_is_refused(
    pair: tuple[Trace, Trace, dict[Any, Any]], make_trace: MakeTrace, rules: Any
) -> None:
    exact, run, _ = pair
    with pytest.raises(RetraceError, match="has no method in the loop"):
        compare(exact, [exact])
    with pytest.raises(RetraceError, match="is not the exact run"):
        compare(run, [run])
    with pytest.raises(RetraceError, match="holds other layers"):
        other = make_trace(rules(heads=4, kv_heads=2), (40, 33), name="other")
        say(other, {"approximation": TOLD})
        compare(exact, [other.path])


DEADLY = """
import os, signal
from pathlib import Path

@dataclass(frozen=True)
class Deadly(ScoreMethod):
    def build(self, past):
        once = Path({once!r})
        if os.getpid() != {here} and (past.group.layer, past.group.sequence) == (1, 1):
            if {always} or not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return past.keys.norm(dim=-1)

    def scores(self, state, queries, positions):
        return state.expand(*queries.shape[:2], -1)
"""


@pytest.fixture
def runs(
    pair: tuple[Trace, Trace, dict[Any, Any]], make_trace: MakeTrace, rules: Any
) -> Callable[[str], list[Any]]:
    """The exact trace's two: one with the method that is named, one with a method that learns."""

    def with_method(spec: str) -> list[Any]:
        paths = []
        for name, told in {"first": {"method": spec}, "learns": {"method": "loki"}}.items():
            learnt = [1] if name == "learns" else []
            layer = rules(heads=4, kv_heads=2)
            run = make_trace([layer, layer], (40, 33), tensors=pair[2]["run"], name=name)
            say(run, {"max_length": 40, "approximation": {**TOLD, **told, "calibration": learnt}})
            paths.append(run.path)
        return paths

    return with_method


def tables(drift: Any, folder: Path) -> dict[str, bytes]:
    """The bytes of all tables."""
    drift.save(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_workers_and_their_deaths_change_nothing(
    pair: tuple[Trace, Trace, dict[Any, Any]],
    runs: Callable[[str], list[Any]],
    write_methods: Callable[..., str],
    tmp_path: Path,
) -> None:
    text = DEADLY.format(once=str(tmp_path / "once"), here=os.getpid(), always=False)
    named = [f"{write_methods(text)}:Deadly"]
    others = runs(*named)
    told: list[tuple[int, int]] = []
    alone = compare(pair[0], others, methods=named, workers=1)
    assert not (tmp_path / "once").exists()
    shared = compare(
        pair[0], others, methods=named, workers=2, progress=lambda *at: told.append(at)
    )
    assert (tmp_path / "once").exists()
    assert tables(shared, tmp_path / "shared") == tables(alone, tmp_path / "alone")
    assert told == [(done, 6) for done in range(1, 7)]  # 2 layers of 2 sequences and of 1
    assert not shared.missing


def test_what_ends_its_workers_is_missing(
    pair: tuple[Trace, Trace, dict[Any, Any]],
    runs: Callable[[str], list[Any]],
    write_methods: Callable[..., str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = DEADLY.format(once=str(tmp_path / "once"), here=os.getpid(), always=True)
    named = [f"{write_methods(text)}:Deadly"]
    others = runs(*named)
    whole, cut = (compare(pair[0], others, methods=named, workers=count).layers for count in (1, 2))
    assert "Layer 1 of sequence 1 is missing: a worker was killed by SIGKILL, 3 t" in caplog.text
    fewer = whole[whole["count"] != cut["count"]]
    assert set(fewer["layer"]) == {1}
    assert fewer["run"].nunique() == 1
    assert set(fewer["count"] - cut["count"][fewer.index]) == {33}


def test_a_method_file_is_run_only_where_it_is_named(pair: Any, tmp_path: Path) -> None:
    exact, run, _ = pair
    file = tmp_path / "mine.py"
    file.write_text("from retrace.analyze.methods.window import Window as Mine\n")
    say(run, {"max_length": 40, "approximation": {**TOLD, "method": f"{file}:Mine"}})
    with pytest.raises(RetraceError, match=r"add --method PATH/mine\.py:Mine"):
        compare(exact.path, [run.path])
    drift = compare(exact.path, [run.path], methods=[f"{file}:Mine"])
    assert list(drift.runs["method"]) == ["mine.py:Mine"]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, "same", ""),
        ({"code": "0" * 64}, "changed", "was captured with other code of window"),
        ({"engine": "0" * 64}, "changed", "was captured with other code of window"),
        ({"code": None}, "unknown", "does not tell which code of window"),
        (None, "unknown", "does not tell which code of window"),
    ],
)
def test_code_that_changed_since_is_told(
    pair: Any, caplog: pytest.LogCaptureFixture, changes: Any, code: str, words: str
) -> None:
    exact, run, _ = pair
    told = Approximation(parse_spec(TOLD["method"]), TOLD["topk"]).facts
    told = TOLD if changes is None else told | changes
    say(run, {"max_length": 40, "approximation": told})
    drift = compare(exact.path, [run.path])
    assert list(drift.runs["code"]) == [code]
    warned = [r.getMessage() for r in caplog.records if "code of" in r.getMessage()]
    assert len(warned) == bool(words) and all(words in line for line in warned)


def test_a_file_that_was_edited_since(pair: Any, tmp_path: Path) -> None:
    exact, run, _ = pair
    file = tmp_path / "mine.py"
    text = "from retrace.analyze.methods.window import Window\n\n\nclass Mine(Window):\n    pass\n"
    named = [f"{file}:Mine"]
    file.write_text(text)
    facts = Approximation(parse_spec(named[0]), 5).facts
    say(run, {"max_length": 40, "approximation": facts})
    for added, code in (("", "same"), ("SLOPE = 2\n", "changed")):
        file.write_text(text + added)
        assert list(compare(exact.path, [run.path], methods=named).runs["code"]) == [code]
