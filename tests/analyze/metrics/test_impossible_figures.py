"""Figures that cannot be are refused by name wherever they arise, and never kept."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from retrace.analyze import Results, analyze
from retrace.analyze.exact.reference import exact_pass
from retrace.analyze.metrics.measure import ExactBlock, plain_tally
from retrace.analyze.metrics.moments import Moments
from retrace.analyze.metrics.possible import impossible
from retrace.analyze.metrics.tally import tally
from retrace.analyze.storage.npz import read_arrays, write_arrays
from retrace.analyze.tables.validation import checked_table
from retrace.analyze.units.unit import Block, load_units
from retrace.traces import RetraceError, Trace

MakeTrace = Callable[..., Trace]


@pytest.mark.parametrize("count", [tally, plain_tally], ids=["compiled", "plain"])
@pytest.mark.parametrize("fault", ["mass", "output", "bytes"])
def test_of_one_query(make_trace: MakeTrace, rules: Any, count: Any, fault: str) -> None:
    unit = next(load_units(make_trace(rules()).layer(0), 0, torch.device("cpu")))
    block = Block(unit, slice(0, len(unit.positions)))
    reference = exact_pass(block, 4)
    buckets = torch.zeros(2, len(block.positions), dtype=torch.int64)
    selection = ExactBlock(block, reference, buckets).selection((1, 4))
    if fault == "mass":
        reference.log_normalizer[0, 30] -= 1
    elif fault == "output":
        output = reference.output.expand(2, -1, -1, -1).clone()
        output[0, 0, 30] = torch.inf
        selection = replace(selection, output=output)
    else:
        aux = torch.zeros(len(block.positions))
        aux[30] = -1e6
        selection = replace(selection, aux_bytes=aux)
    exact = ExactBlock(block, reference, buckets)
    with pytest.raises(RetraceError, match=r"cannot be, .* at layer 0, head 0, .*position 30"):
        count(exact, selection, [0, 1], torch.zeros(2, dtype=torch.int64))
    # Of queries that do not count nothing is asked.
    count(exact, selection, [0, 1], torch.full((2,), 31))


def test_kept_answers_that_cannot_be_are_computed_anew(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(), name="own")
    wanted = analyze(trace, ["quest"], [2], workers=1).metrics
    for shift in (-0.5, 0.5, np.nan):
        for file in trace.path.with_name("own.exact").rglob("*.npz"):
            arrays = read_arrays(file)
            assert arrays is not None
            write_arrays(file, {**arrays, "log_normalizer": arrays["log_normalizer"] + shift})
        found = analyze(trace, ["quest"], [2], workers=1).metrics
        pd.testing.assert_frame_equal(found, wanted)


def test_of_saved_tables(make_trace: MakeTrace, rules: Any, tmp_path: Path) -> None:
    results = analyze(make_trace(rules()), ["quest"], [2], workers=1, keep_exact=False)
    for metric, number in (("recall", 1.2), ("error_norm", np.inf), ("bytes_ratio", -3.0)):
        table = results.metrics.copy()
        table.loc[table["metric"] == metric, "mean"] = number
        with pytest.raises(ValueError, match=f"cannot be, {metric} of .* of quest in layer 0"):
            checked_table(table, "metrics.parquet")
    spoilt = replace(results, metrics=table)
    spoilt.save(tmp_path / "out")
    with pytest.raises(RetraceError, match="cannot be, bytes_ratio of -3 of quest"):
        Results.load(tmp_path / "out")


def test_of_moments() -> None:
    def of(mean: float, squares: float = 0.0, count: float = 3.0) -> Moments:
        return Moments(*(np.array([number]) for number in (count, mean, squares)))

    for metric, moments in (
        ("recall", of(1.01)),
        ("density", of(np.nan)),
        ("error_norm", of(np.inf)),
        ("bytes_ratio", of(-0.1)),
        ("error_norm", of(1.0, squares=-1.0)),
        ("error_norm", of(1.0, count=np.nan)),
    ):
        assert impossible(metric, moments).all()
    assert not impossible("bytes_ratio", of(7.0)).any()
    assert not impossible("attention_fraction", of(1 + 1e-7)).any()
