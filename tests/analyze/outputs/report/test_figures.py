"""What a page holds are the figures of the results, to the digits that it shows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import METRICS, Results
from retrace.analyze.metrics.patterns import PATTERNS
from retrace.analyze.outputs.report.packed import Packed, rounded
from retrace.analyze.outputs.report.page import page

pytest.importorskip("plotly", reason="needs the report extra")

Make = Callable[..., Results]


def table(rows: pd.DataFrame, column: str, **wanted: Any) -> np.ndarray:
    """The figures (layers, heads) of some rows."""
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    cells: pd.DataFrame = rows.pivot(index="layer", columns="head", values=column)
    return cells.to_numpy(float)


def test_every_mean_std_and_count(made: Make, held: Any) -> None:
    # Layers need not be all of a model's, nor in order; a budget may have no query that counts.
    results = made([0, 2, 7], 4, ["exact", "quest", "loki"], [5, 10, 50], [1, 2], empty=[50])
    results.metrics = results.metrics.sample(frac=1, random_state=0, ignore_index=True)
    read = held(page({"r": results}))
    assert read.index["runs"][0]["layers"] == [0, 2, 7]
    assert read.index["runs"][0]["modules"][1] == "model.layers.2.self_attn"
    assert {entry["label"] for entry in read.index["entries"]} == {"exact", "quest", "loki"}
    for entry in read.index["entries"]:
        assert entry["topk"] == [5, 10, 50]
        for metric in METRICS:
            for k, places in zip(entry["topk"], entry["figures"][metric], strict=True):
                wanted = dict(method=entry["method"], metric=metric, topk=k)
                for column, precision in (("mean", 2e-5), ("std", 4e-3), ("count", 0)):
                    np.testing.assert_allclose(
                        read.grid(entry, places[column]),
                        table(results.metrics, column, **wanted),
                        rtol=precision,
                    )


def test_patterns_of_heads(made: Make, held: Any) -> None:
    results = made([0, 2, 7], 4, ["quest"], [5], [5], patterns=True)
    rows = results.head_patterns
    missing = (rows["layer"] == 2) & (rows["head"] == 3)
    results.head_patterns = rows[~missing].sample(frac=1, random_state=0)
    read = held(page({"r": results, "other": made([0], 1, ["quest"], [5], [5])}))
    found, none = (run["patterns"] for run in read.index["runs"])
    assert none is None
    entry = read.entry("r: quest")
    assert list(found["held"]) == list(PATTERNS)
    for pattern, place in found["held"].items():
        wanted = table(results.head_patterns, "mean", pattern=pattern)
        np.testing.assert_allclose(read.grid(entry, place), wanted, rtol=2e-5)
    best = read.grid(entry, found["best"])
    assert np.argwhere(np.isnan(best)).tolist() == [[1, 3]]
    for row in rows[rows["best"] & ~missing].itertuples():
        kind = best[[0, 2, 7].index(row.layer), row.head]
        assert found["kinds"][int(kind)] == row.pattern


def test_curves_have_every_budget_while_they_are_few(made: Make, held: Any) -> None:
    results = made(range(3), 2, ["exact", "quest"], [5, 30], range(1, 31))
    read = held(page({"r": results}))
    entry = read.entry("quest")
    assert entry["curve_topk"] == list(range(1, 31))
    for metric, places in entry["curves"].items():
        for k, place in zip(entry["curve_topk"], places, strict=True):
            np.testing.assert_allclose(
                read.grid(entry, place),
                table(results.curves, "mean", method="quest", metric=metric, topk=k),
                rtol=3e-4,
            )


def test_long_curves_are_thinned_evenly_over_the_logarithm(made: Make, held: Any) -> None:
    results = made([0], 1, ["quest"], [4000], range(1, 4001))
    budgets = held(page({"r": results})).entry("quest")["curve_topk"]
    assert len(budgets) <= 40
    assert budgets[0] == 1 and budgets[-1] == 4000
    steps = np.diff(np.log(budgets[12:]))
    assert steps.max() < 1.5 * np.log(4000) / 39


def test_exact_attention_stands_beside_methods_without_it(made: Make, held: Any) -> None:
    results = made(range(2), 3, ["quest", "loki"], [5, 10], [1, 2, 5, 10])
    read = held(page({"r": results}))
    entry = read.index["entries"][0]
    assert entry["derived"] and entry["method"] == "exact"
    assert list(entry["figures"]) == ["attention_fraction"]
    for k, places in zip([5, 10], entry["figures"]["attention_fraction"], strict=True):
        wanted = dict(method="loki", metric="exact_attention_fraction", topk=k)
        np.testing.assert_allclose(
            read.grid(entry, places["mean"]), table(results.metrics, "mean", **wanted), rtol=2e-5
        )


def test_methods_of_several_results(made: Make, held: Any) -> None:
    small = made(range(2), 2, ["exact", "quest"], [5], [5], seed=1)
    large = made(range(5), 3, ["exact", "quest", "window"], [5, 9], [5], seed=2)
    read = held(page({"small": small, "large": large}))
    labels = [entry["label"] for entry in read.index["entries"]]
    assert labels[:2] == ["small: exact", "small: quest"] and "large: window" in labels
    for name, results in (("small", small), ("large", large)):
        entry = read.entry(f"{name}: quest")
        place = entry["figures"]["error_norm"][0]["mean"]
        wanted = dict(method="quest", metric="error_norm", topk=5)
        np.testing.assert_allclose(
            read.grid(entry, place), table(results.metrics, "mean", **wanted), rtol=2e-5
        )
    assert read.index["runs"][1]["facts"] == large.run


def test_a_method_measured_at_other_budgets(made: Make, held: Any) -> None:
    results = made([0], 2, ["exact", "quest"], [5, 10], [5])
    rows = results.metrics
    results.metrics = rows[(rows["method"] != "quest") | (rows["topk"] == 10)]
    read = held(page({"r": results}))
    assert read.entry("quest")["topk"] == [10] and read.entry("exact")["topk"] == [5, 10]


def test_every_method_looks_different(made: Make, held: Any) -> None:
    results = made([0], 1, ["exact", *(f"method-{i}" for i in range(60))], [5], [5])
    looks = [tuple(e["style"].values()) for e in held(page({"r": results})).index["entries"]]
    assert len(set(looks)) == 61


def test_rounding_is_to_the_nearest_and_keeps_what_is_no_number() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    for bits in (7, 11, 15):
        error = np.abs(rounded(values, bits) - values) / np.abs(values)
        assert error.max() <= 2.0 ** -(bits + 1)
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0], np.float32)
    np.testing.assert_array_equal(rounded(odd, 7), odd)
    np.testing.assert_array_equal(rounded(values, 23), values)


def test_equal_grids_are_held_once() -> None:
    packed = Packed()
    grid = np.arange(6.0)
    assert packed.add(grid) == packed.add(grid.copy()) == 0
    assert packed.add(grid + 1) == 6


def test_the_same_results_make_the_same_page(made: Make) -> None:
    results = made([0], 2, ["exact", "quest"], [5], [5])
    assert page({"r": results}) == page({"r": results})
