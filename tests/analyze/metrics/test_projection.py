"""Errors after the output projection, against plain float64 over all heads of a query at once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import Plan, Results, analyze, merge
from retrace.analyze.plans.plan import PlannedLayer, Setting
from retrace.traces import LayerRules, OutputProjection, RetraceError, Trace, create_trace
from retrace.traces import open_trace as opened

HIDDEN = 12
Make = Callable[..., Trace]


@pytest.fixture
def make(tmp_path: Path, tensors: Any) -> Make:
    """Writes a trace with an output projection of every layer, or the reason why it has none."""

    def make(
        layers: Sequence[LayerRules],
        lengths: Sequence[int],
        projections: Sequence[np.ndarray | str | None],
        name: str = "projected",
    ) -> Trace:
        generator = np.random.default_rng(5)
        positions = [np.arange(n, dtype=np.int32) for n in lengths]
        told: dict[int, Any] = {
            i: own
            if isinstance(own, str)
            else OutputProjection(f"layers.{i}.o_proj", len(own), partial(np.copy, own))
            for i, own in enumerate(projections)
            if own is not None
        }
        writer = create_trace(
            tmp_path / f"{name}.zarr",
            rules={i: replace(r, module=f"layers.{i}") for i, r in enumerate(layers)},
            tokens=positions,
            query_positions=positions,
            dtype="float32",
            attributes={"model": "random", "task": "none"},
            projections=told,
        )
        for sequence, length in enumerate(lengths):
            for layer, rules in enumerate(layers):
                given = (t.astype(np.float32) for t in tensors(rules, length, generator))
                writer.write_layer(sequence, layer, *given)
            writer.finish_sequence(sequence, generator.random(length, np.float32))
        writer.close()
        return opened(writer.path)

    return make


def weights_of(rules: LayerRules, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((HIDDEN, rules.heads, rules.value_dim)).astype(np.float32)


def expected(
    trace: Trace, queries_of: Any, layer: int, k: int, first: int, select: Any
) -> tuple[float, float, int]:
    """Mean, std and count over queries of ||W_o (o - o')|| / ||W_o o||, heads side by side."""
    weights = trace.layer(layer).output_projection
    assert weights is not None
    per_query: dict[tuple[int, int], dict[int, Any]] = {}
    groups = queries_of(trace, layer)
    rows = sum(trace.length(s) for s in trace.sequences)
    heads = trace.layer(layer).rules.kv_heads
    places = [(s, p) for s in trace.sequences for _ in range(heads) for p in range(trace.length(s))]
    assert len(groups) == len(places) == rows * heads
    for place, group in zip(places, groups, strict=True):
        for query in group:
            per_query.setdefault(place, {})[query.head] = query
    errors = []
    for (_, position), query_of in per_query.items():
        if position < first:
            continue
        right, found = (
            sum(weights[:, h].astype(np.float64) @ out(query) for h, query in query_of.items())
            for out in (lambda q: q.output, lambda q: q.renormalised(select(q, k)))
        )
        errors.append(np.linalg.norm(right - found) / np.linalg.norm(right))
    return float(np.mean(errors)), float(np.std(errors)), len(errors)


def test_against_the_definition(make: Make, any_rules: Any, queries_of: Any) -> None:
    trace = make(
        [any_rules, any_rules], [53, 31], [weights_of(any_rules), weights_of(any_rules, 1)]
    )
    results = analyze(trace, ["exact", "window:keep=none"], [3, 6], min_context=9, projected=True)
    assert len(results.projected) == 2 * 2 * 2
    for row in results.projected.to_dict("records"):
        last = lambda query, k: query.visible[::-1][:k]  # noqa: E731
        select = last if row["method"] != "exact" else lambda query, k: query.top(k)
        mean, std, count = expected(trace, queries_of, row["layer"], row["topk"], 9, select)
        assert row["module"] == f"layers.{row['layer']}" and row["count"] == count
        assert row["mean"] == pytest.approx(mean, rel=1e-4, abs=1e-6)
        assert row["std"] == pytest.approx(std, rel=1e-3, abs=1e-6)


def test_each_budget_counts_its_own(make: Make, rules: Any, queries_of: Any) -> None:
    own = rules(heads=4, kv_heads=2)
    trace = make([own], [53], [weights_of(own)])
    results = analyze(trace, ["exact"], [2, 4], min_context="each", projected=True)
    for row in results.projected.to_dict("records"):
        k = row["topk"]
        mean, _, count = expected(trace, queries_of, 0, k, 10 * k, lambda query, k: query.top(k))
        assert (row["count"], row["mean"]) == (count, pytest.approx(mean, rel=1e-4))


def test_all_keys_kept_leave_no_error(make: Make, rules: Any) -> None:
    own = rules(heads=4, kv_heads=2, sinks=(0.5, -1.0, 2.0, 4.0))
    trace = make([own], [40], [weights_of(own)])
    results = analyze(trace, ["exact", "dense"], [40], min_context=0, projected=True)
    assert len(results.projected) == 2
    assert (results.projected["mean"] < 1e-6).all()


@pytest.mark.parametrize(
    ("protocol", "methods"),
    [
        ("all:16", ["exact", "quest:page=4", "oracle-sample", "clusterkv", "sparq", "flat"]),
        ("decode:8:from=24", ["h2o", "tova"]),
        ("prefill:8", ["block-oracle:block=4", "a-shape:block=4"]),
    ],
)
def test_of_one_head_turned(make: Make, rules: Any, protocol: str, methods: list[str]) -> None:
    """An orthogonal W_o changes no norm: one head's error is what it was."""
    own = rules(heads=1, kv_heads=1)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    trace = make([own], [70, 50], [turn.astype(np.float32)[:, None]])
    results = analyze(trace, methods, [8], protocol=protocol, min_context=32, projected=True)
    rows = results.metrics[results.metrics["metric"] == "error_norm"].set_index("method")
    assert list(results.projected["method"]) == methods
    for row in results.projected.to_dict("records"):
        for figure in ("mean", "std"):
            assert row[figure] == pytest.approx(rows[figure][row["method"]], rel=1e-4, abs=1e-6)
        assert row["count"] == rows["count"][row["method"]]


def test_nothing_else_changes(make: Make, rules: Any, tmp_path: Path) -> None:
    """Nor does anything with the number of workers, or where a job is done in parts."""
    own = rules(heads=4, kv_heads=2)
    trace = make([own, own], [70, 50, 1], [weights_of(own)] * 2)
    methods, asked = ["exact", "quest:page=4", "h2o"], {"min_context": 20, "projected": True}
    plain = analyze(trace, methods, [2, 5], min_context=20)
    one = analyze(trace, methods, [2, 5], workers=1, **asked)
    assert plain.projected.empty and len(one.projected) == 3 * 2 * 2
    for name in ("metrics", "curves", "sequences", "positions", "tails"):
        pd.testing.assert_frame_equal(getattr(plain, name), getattr(one, name), check_exact=True)
    four = analyze(trace, methods, [2, 5], workers=4, out=tmp_path / "four", **asked)
    for part in (1, 2):
        analyze(trace, methods, [2, 5], part=(part, 2), out=tmp_path / "parts", **asked)
    for other in (four, Results.load(tmp_path / "four"), merge([tmp_path / "parts"])):
        pd.testing.assert_frame_equal(one.projected, other.projected, check_exact=True)


def test_results_that_lack_it_are_measured_again(
    make: Make, rules: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = rules()
    trace, out = make([own], [60], [weights_of(own)]), tmp_path / "r"
    analyze(trace, ["exact"], [3], min_context=20, out=out)
    told = analyze(trace, ["exact"], [3], min_context=20, out=out, projected=True)
    assert list(told.projected["topk"]) == [3] and len(told.run["history"]) == 2
    assert "Errors after the output projection" in (out / "table.md").read_text()
    both = analyze(trace, ["exact"], [3, 5], min_context=20, out=out, projected=True)
    assert list(both.projected["topk"]) == [3, 5]
    assert both.run["history"][-1]["methods"] == {"exact": [5]}
    more = analyze(trace, ["exact"], [3], min_context=20, out=out, again=True)
    assert more.projected.empty and "its projected errors are dropped" in caplog.text


def test_where_there_is_no_projection(
    make: Make, rules: Any, caplog: pytest.LogCaptureFixture
) -> None:
    own = rules()
    gated = make([own, own], [60], [weights_of(own), "it is gated"], "gated")
    results = analyze(gated, ["exact"], [3], projected=True)
    assert list(results.projected["layer"]) == [0]
    assert "No projected errors of layer 1" in caplog.text and "it is gated" in caplog.text
    with pytest.raises(RetraceError, match=r"has none of these \(layer 1: it is gated\)"):
        analyze(gated, ["exact"], [3], layers=[1], projected=True)
    none = make([own], [60], [None], "none")
    with pytest.raises(RetraceError, match="an earlier capture kept none"):
        analyze(none, ["exact"], [3], projected=True)


def test_who_writes_into_keys_is_named(
    make: Make, rules: Any, write_methods: Any, untried: None
) -> None:
    body = """
    @dataclass(frozen=True)
    class Writes(ScoreMethod):
        \"\"\"Writes into the keys.\"\"\"
        source = "none"
        holds_keys = False

        def build(self, past):
            return past

        def scores(self, state, queries, positions):
            state.keys.mul_(2)
            return (queries @ state.keys.T)
    """
    own = rules(heads=4, kv_heads=2)
    trace = make([own], [60], [weights_of(own)])
    with pytest.raises(RetraceError, match=r"Writes .*wrote into"):
        analyze(trace, [f"{write_methods(body)}:Writes", "exact"], [3], projected=True)


def test_a_plan_of_one_method_is_that_method(make: Make, rules: Any) -> None:
    """And a plan whose heads differ is neither of them, though both are in it."""
    layers = [rules(heads=4, kv_heads=2)]
    trace = make(layers, [40, 30], [weights_of(layers[0])])
    options: dict[str, Any] = {"min_context": 12, "projected": True, "keep_exact": False}

    def errors(*settings: Setting) -> pd.DataFrame:
        plan = Plan({0: PlannedLayer(trace.layer(0).rules.module, settings)})
        return analyze(trace, plan, **options).projected.drop(columns="method")

    window, exact = Setting("window", 6), Setting("exact", 4)
    alone = analyze(trace, "window", [6], **options).projected.drop(columns="method")
    pd.testing.assert_frame_equal(errors(window, window), alone, check_exact=True)
    [mixed], [full] = (errors(window, one)["mean"] for one in (exact, Setting("dense")))
    [whole] = alone["mean"]
    assert 0 < full < whole and mixed not in (full, whole)
