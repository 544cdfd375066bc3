"""Results as labelled arrays."""

import json
from typing import TYPE_CHECKING, Any

import pandas as pd

from retrace.analyze.libraries import optional

if TYPE_CHECKING:
    from retrace.analyze.results import Results

SUFFIX = {"mean": "", "std": "_std", "count": "_count"}
"""What stands behind a metric's name in the names of variables."""


def to_xarray(results: "Results") -> Any:
    """An xarray Dataset; see `Results.to_xarray`."""
    xarray = optional("xarray", "pip install xarray", "A dataset")
    dataset = xarray.merge(
        [_dataset(results.metrics, "topk", ""), _dataset(results.curves, "k", "_curve")]
    ).reindex(spec=results.methods())
    modules = results.metrics.drop_duplicates("layer").set_index("layer")["module"]
    dataset = dataset.assign_coords(module=("layer", modules[dataset["layer"].values].to_numpy()))
    run = results.run
    # Attributes of netCDF are text or numbers.
    facts = {name: run.get(name) for name in ("retrace", "trace", "protocol", "min_context")}
    facts |= {name: json.dumps(run.get(name)) for name in ("model", "task", "methods")}
    return dataset.assign_attrs({name: str(value) for name, value in facts.items()})


def _dataset(rows: pd.DataFrame, budget: str, ending: str) -> Any:
    """Variables (spec, layer, head, budget) of a table; NaN where it has no row."""
    keys = ["spec", "layer", "head", budget]
    # Not `method`, which is an argument of xarray's own `sel`.
    rows = rows.rename(columns={"method": "spec", "topk": budget}).set_index([*keys, "metric"])
    columns = {
        f"{metric}{ending}{suffix}": rows.xs(metric, level="metric")[part]
        for metric in rows.index.unique("metric")
        for part, suffix in SUFFIX.items()
    }
    return pd.DataFrame(columns).to_xarray()
