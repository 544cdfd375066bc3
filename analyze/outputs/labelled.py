"""Figures as labelled arrays."""

import json
from collections.abc import Iterator
from typing import Any

import pandas as pd

from retrace.analyze.metrics.buckets import AXES
from retrace.analyze.optional import optional
from retrace.analyze.tables.figures import Figures

SUFFIX = {"mean": "", "std": "_std", "count": "_count"}
"""What stands behind a metric's name in the names of variables."""


def to_xarray(results: Figures) -> Any:
    """An xarray Dataset; see `Figures.to_xarray`."""
    xarray = optional("xarray", "pip install xarray", "A dataset")
    dataset = xarray.merge(
        [
            _dataset(results.metrics, "topk", ""),
            _dataset(results.curves, "k", "_curve"),
            *(_dataset(rows, "topk", f"_by_{axis}", axis) for axis, rows in _by_axis(results)),
        ]
    ).reindex(spec=results.methods())
    modules = results.metrics.drop_duplicates("layer").set_index("layer")["module"]
    dataset = dataset.assign_coords(module=("layer", modules[dataset["layer"].values].to_numpy()))
    run = results.run
    # Attributes of netCDF are text or numbers.
    known = ("retrace", "trace", "protocol", "min_context", "where", "evidence")
    facts = {name: run.get(name) for name in known}
    facts |= {name: json.dumps(run.get(name)) for name in ("model", "task", "methods")}
    return dataset.assign_attrs({name: str(value) for name, value in facts.items()})


def _by_axis(results: Figures) -> Iterator[tuple[str, pd.DataFrame]]:
    """The axes that queries are told apart by, with the rows of their buckets."""
    for axis in AXES:
        rows = results.positions[results.positions["axis"] == axis]
        if not rows.empty:
            named = rows.rename(columns={"first": axis})
            yield axis, named.astype({"method": "str", "metric": "str"})


def _dataset(rows: pd.DataFrame, budget: str, ending: str, *more: str) -> Any:
    """Variables (spec, layer, head, budget, more) of a table; NaN where it has no row."""
    keys = ["spec", "layer", "head", budget, *more]
    # Not `method`, which is an argument of xarray's own `sel`.
    rows = rows.rename(columns={"method": "spec", "topk": budget}).set_index([*keys, "metric"])
    columns = {
        f"{metric}{ending}{suffix}": rows.xs(metric, level="metric")[part]
        for metric in rows.index.unique("metric")
        for part, suffix in SUFFIX.items()
    }
    return pd.DataFrame(columns).to_xarray()
