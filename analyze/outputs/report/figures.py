"""What a page holds of results: every method's figures as grids over layers and heads."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from retrace.analyze.metrics.registry import (
    AT_ALL,
    AT_BLOCKS,
    AT_MARKED,
    BUCKETED,
    BY_NAME,
    METRICS,
    Metric,
)
from retrace.analyze.outputs.locality import locality_summary
from retrace.analyze.outputs.markdown import remarks
from retrace.analyze.outputs.plots.style import DASHES, EXACT_STYLE, Style, styles_of
from retrace.analyze.outputs.report.along import along, fit
from retrace.analyze.outputs.report.intervals import ends_within, intervals_of
from retrace.analyze.outputs.report.packed import Packed
from retrace.analyze.outputs.report.patterns import patterns_of
from retrace.analyze.outputs.report.tails import tails_of
from retrace.analyze.tables.figures import Figures
from retrace.analyze.units.costs import serving_words, with_charge

MEAN_BITS = 15
"""Of a mean's mantissa: an error of 1.5e-5 of it, and four decimals are shown."""
STD_BITS = 7
CURVE_BITS = 11
"""Of a curve's points between the budgets asked for: finer than a screen."""
CURVE_POINTS = 40
"""Most points of a curve; budgets are spread evenly over their logarithm."""
CURVE_FIGURES = 3_600_000
"""Most figures of all curves of a page together, so that a large model's page can be mailed."""
EXACT = "exact"
DERIVED = "exact_attention_fraction"
"""What exact attention's fraction is read off, of the other methods' rows."""
CURVED = tuple(name for name in AT_ALL if name in BUCKETED or name == DERIVED)
"""Metrics that the page draws curves of, and exact attention's fraction beside them."""


class Entry(NamedTuple):
    """A method of one of the results, as the page lists it."""

    run: int
    method: str
    derived: bool
    """Exact attention's fraction, read off the other methods' rows where `exact` was not run."""


def figures_of(results: Mapping[str, Figures], packed: Packed) -> dict[str, Any]:
    """The index of a page: runs with their facts, and the methods with the places of their grids.

    A grid is (layers, heads) of its run, NaN where there is no figure; `packed` takes it.

    Args:
        results: by the name that the page gives them.
    """
    entries = [entry for run, name in enumerate(results) for entry in _entries(run, results[name])]
    runs = list(results.values())
    labels = _labels(entries, results)
    styles = _styles(entries, labels)
    points = _curve_points(entries, runs)
    grids = [_Grids.of(run, points, packed) for run in runs]
    intervals, differences = zip(*map(intervals_of, runs), strict=True)
    whole = fit(runs)
    shared, places = zip(
        *(
            along(run, part.layers, part.heads if whole else 1, packed)
            for run, part in zip(runs, grids, strict=True)
        ),
        strict=True,
    )
    return {
        "metrics": {
            name: _of_page(metric)
            for name, metric in BY_NAME.items()
            # Of other protocols there are none of blocks of queries, nor are keys always marked.
            if name not in (*AT_BLOCKS, *AT_MARKED)
            or any((run.metrics["metric"] == name).any() for run in runs)
        },
        "cost": _cost(runs),
        "predicts": remarks(*(run.run for run in runs)),
        "runs": [
            {"name": name, "facts": run.run, "layers": part.layers, "modules": part.modules,
             "heads": part.heads, "served": serving_words(run.run),
             "sequences": int(run.sequences["sequence"].nunique()),
             "intervals": own, "differences": less, "along": buckets,
             "ends": ends_within(run, part.layers, part.heads, packed),
             "patterns": patterns_of(run, part.layers, part.heads, packed),
             "locality": _locality(run), "tails": tails_of(run)}
            for (name, run), part, own, less, buckets in zip(
                results.items(), grids, intervals, differences, shared, strict=True
            )
        ],
        "entries": [
            {"run": entry.run, "method": entry.method, "label": label, "derived": entry.derived,
             "style": styles[label]._asdict(), **grids[entry.run].places(entry),
             "along": {} if entry.derived else places[entry.run].get(entry.method, {})}
            for entry, label in zip(entries, labels, strict=True)
        ],
    }  # fmt: skip


def _cost(runs: list[Figures]) -> str:
    """The metric of what methods take, if all runs have the same."""
    costs = {run.cost for run in runs}
    return costs.pop() if len(costs) == 1 else "bytes_ratio"


def _locality(results: Figures) -> dict[str, list[Any]]:
    """How keys move from query to query, as a table in words; no rows where nobody asked."""
    table = locality_summary(results.locality)
    return {"titles": list(table.columns), "rows": table.to_numpy().tolist()}


def _of_page(metric: Metric) -> dict[str, Any]:
    """What the page says of a metric, and how it draws it."""
    told = ("title", "axis", "description", "most", "better", "bucketed")
    return {name: getattr(metric, name) for name in told}


def _entries(run: int, results: Figures) -> Iterator[Entry]:
    methods = results.methods()
    if EXACT not in methods:
        yield Entry(run, EXACT, True)
    for method in methods:
        yield Entry(run, method, False)


def _labels(entries: list[Entry], results: Mapping[str, Figures]) -> list[str]:
    """A method's spec, with what is not charged; of several results also which."""
    names, runs = list(results), [one.run for one in results.values()]
    words = [
        f"{e.method} (top k of the scores)" if e.derived else with_charge(runs[e.run], e.method)
        for e in entries
    ]
    if len(names) == 1:
        return words
    return [f"{names[e.run]}: {word}" for e, word in zip(entries, words, strict=True)]


def _styles(entries: list[Entry], labels: list[str]) -> dict[str, Style]:
    """By label; exact attention is black in every run, in dashes of the run's own."""
    exact = {
        label: EXACT_STYLE._replace(dashes=DASHES[entry.run % len(DASHES)])
        for entry, label in zip(entries, labels, strict=True)
        if entry.method == EXACT
    }
    return {**styles_of(label for label in labels if label not in exact), **exact}


def _curve_points(entries: list[Entry], runs: list[Figures]) -> int:
    """How many points of each curve fit the page."""
    heads = [len(run.metrics[["layer", "head"]].drop_duplicates()) for run in runs]
    one = len(CURVED) * sum(heads[entry.run] for entry in entries)
    return int(np.clip(CURVE_FIGURES // max(1, one), 4, CURVE_POINTS))


class _Grids:
    """The places of one run's grids, by method, metric and budget."""

    def __init__(self, layers: list[int], modules: list[str], heads: int) -> None:
        self.layers = layers
        self.modules = modules
        self.heads = heads
        self._figures: dict[tuple[str, str, int], dict[str, int]] = {}
        self._curves: dict[tuple[str, str, int], int] = {}

    @classmethod
    def of(cls, results: Figures, points: int, packed: Packed) -> "_Grids":
        """Pack the grids of results."""
        names = results.metrics[["layer", "module"]].drop_duplicates("layer").sort_values("layer")
        heads = int(results.metrics["head"].max()) + 1
        grids = cls([int(i) for i in names["layer"]], [str(m) for m in names["module"]], heads)
        for key, part in grids._parts(results.metrics, list(METRICS)):
            grids._figures[key] = {
                "mean": packed.add(grids._grid(part, "mean"), MEAN_BITS),
                "std": packed.add(grids._grid(part, "std"), STD_BITS),
                "count": packed.add(grids._grid(part, "count")),
            }
        chosen = _thinned(results.curves, points)
        for key, part in grids._parts(chosen, list(CURVED)):
            grids._curves[key] = packed.add(grids._grid(part, "mean"), CURVE_BITS)
        return grids

    def places(self, entry: Entry) -> dict[str, Any]:
        """A method's budgets, and the places of its grids at each of them, None where there is
        none: of those asked for, and of its curves."""
        if entry.derived:
            names = {"attention_fraction": DERIVED}
        else:
            names = {metric: metric for metric in METRICS}
        owner = {
            (metric, k): (method, metric, k)
            for table in (self._curves, self._figures)
            for method, metric, k in table
            if metric in names.values() and (entry.derived or method == entry.method)
        }
        found = {key: self._figures.get(place) for key, place in owner.items()}
        curves = {key: self._curves.get(place) for key, place in owner.items()}
        topk = sorted({k for (_, k), place in found.items() if place is not None})
        curve_topk = sorted({k for (_, k), place in curves.items() if place is not None})
        return {
            "topk": topk,
            "figures": {
                name: [found.get((metric, k)) for k in topk] for name, metric in names.items()
            },
            "curve_topk": curve_topk,
            "curves": {
                name: [curves.get((metric, k)) for k in curve_topk]
                for name, metric in names.items()
                if metric in CURVED
            },
        }

    def _parts(
        self, rows: pd.DataFrame, metrics: list[str]
    ) -> Iterator[tuple[tuple[str, str, int], pd.DataFrame]]:
        rows = rows[rows["metric"].isin(metrics)]
        place = np.searchsorted(self.layers, rows["layer"]) * self.heads + rows["head"].to_numpy()
        columns = {name: rows[name].to_numpy() for name in ("mean", "std", "count")}
        keys = {name: pd.Categorical(rows[name]) for name in ("method", "metric", "topk")}
        figures = pd.DataFrame({"place": place, **columns, **keys})
        key: Any
        for key, part in figures.groupby(list(keys), sort=False, observed=True):
            method, metric, k = key
            yield (str(method), str(metric), int(k)), part

    def _grid(self, part: pd.DataFrame, column: str) -> npt.NDArray[np.float64]:
        grid = np.full(len(self.layers) * self.heads, np.nan)
        grid[part["place"]] = part[column]
        return grid


def _thinned(curves: pd.DataFrame, points: int) -> pd.DataFrame:
    """The rows of at most so many budgets, evenly spread over their logarithm."""
    budgets = np.sort(curves["topk"].unique())
    if len(budgets) <= points:
        return curves
    wanted = np.geomspace(budgets[0], budgets[-1], points)
    nearest = np.abs(budgets[:, None] - wanted).argmin(axis=0)
    return curves[curves["topk"].isin(budgets[nearest])]
