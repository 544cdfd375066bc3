"""Results as an xarray Dataset."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrace.analyze import analyze
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]


def test_every_figure_has_its_place(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray", reason="xarray is not installed")
    trace = make_trace([rules(heads=4), rules(heads=2)], [53, 40])
    results = analyze(trace, ["window", "exact"], [2, 5], min_context=20, keep_exact=False)
    found = results.to_xarray()
    assert found["spec"].values.tolist() == ["window", "exact"]
    assert found["recall"].dims == ("spec", "layer", "head", "topk")
    assert found["module"].values.tolist() == ["model.layers.0", "model.layers.1"]
    assert json.loads(found.attrs["methods"]).keys() == {"window", "exact"}
    for table, budget, ending in ((results.metrics, "topk", ""), (results.curves, "k", "_curve")):
        for row in table.to_dict("records"):
            at = {"spec": row["method"], "layer": row["layer"], "head": row["head"]}
            for part, suffix in (("mean", ""), ("std", "_std"), ("count", "_count")):
                variable = found[f"{row['metric']}{ending}{suffix}"].sel(at)
                np.testing.assert_equal(float(variable.sel({budget: row["topk"]})), row[part])
    assert found["recall_by_position"].dims == ("spec", "layer", "head", "topk", "position")
    for row in results.positions.to_dict("records"):
        at = {"spec": row["method"], "layer": row["layer"], "head": row["head"]}
        at |= {"topk": row["topk"], row["axis"]: row["first"]}
        variable = found[f"{row['metric']}_by_{row['axis']}"]
        assert float(variable.sel(at)) == row["mean"]
    # Layer 1 has two heads only.
    assert found["recall"].sel(layer=1, head=3).isnull().all()
    found.to_netcdf(tmp_path / "r.nc", engine="scipy")
    xarray.testing.assert_allclose(xarray.load_dataset(tmp_path / "r.nc"), found)


def test_without_xarray(make_trace: MakeTrace, rules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results = analyze(make_trace(rules(), [30]), ["window"], [2], keep_exact=False)
    monkeypatch.setitem(__import__("sys").modules, "xarray", None)
    with pytest.raises(RetraceError, match="pip install xarray"):
        results.to_xarray()
