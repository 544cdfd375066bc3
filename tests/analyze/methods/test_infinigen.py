"""InfiniGen's skewed columns against NumPy in float64."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch

from retrace.analyze import Past, analyze, parse_spec
from retrace.analyze.methods.infinigen import InfiniGen
from retrace.analyze.units.unit import load_units
from retrace.traces import LayerRules, RetraceError, Trace

MakeTrace = Callable[..., Trace]
Rules = Callable[..., LayerRules]
LENGTH, END = 60, 40


def past_of(trace: Trace, sequence: int, end: int = LENGTH) -> Past:
    return Past(next(load_units(trace.layer(0), sequence, torch.device("cpu"))), 0, end)


@pytest.mark.parametrize("columns", [0.25, 0.5, 1.0])
def test_scores(make_trace: MakeTrace, rules: Rules, columns: float) -> None:
    """From states built early and extended; with all columns they are the exact products."""
    trace = make_trace([rules(heads=4)], [LENGTH, LENGTH])
    learnt, whole, past = past_of(trace, 1), past_of(trace, 0), past_of(trace, 0, END)
    method = parse_spec(f"infinigen:columns={columns}").method
    assert isinstance(method, InfiniGen)
    state = method.build(Past(past.unit, 0, END, method.calibrate([learnt])))
    state = method.extend(state, Past(past.unit, END, LENGTH))
    queries = whole.queries[:, END:]
    found = method.scores(state, queries, torch.arange(END, LENGTH)).double().numpy()
    keys = whole.keys.double().numpy()
    for head in range(2):
        ours: npt.NDArray[np.float64] = whole.queries[head].double().numpy()
        skew = np.linalg.svd(learnt.queries[head].double().numpy())[2].T
        chosen = np.argsort(-np.abs(ours[:END] @ skew).sum(axis=0))[: int(8 * columns)]
        wanted = (ours[END:] @ skew[:, chosen]) @ (keys @ skew[:, chosen]).T
        np.testing.assert_allclose(found[head], wanted, atol=1e-4)
        if columns == 1:
            np.testing.assert_allclose(found[head], ours[END:] @ keys.T, atol=1e-4)


def test_attends_what_is_near_the_largest(make_trace: MakeTrace, rules: Rules) -> None:
    """All columns and a budget of all keys: those whose logit is within the margin."""
    trace = make_trace([rules(heads=4)], [LENGTH, 40])
    specs = ["exact:budget=threshold:4", "infinigen:columns=1.0"]
    rows = analyze(
        trace, specs, [60], min_context=0, calibration_sequences=[1], keep_exact=False
    ).metrics
    rows = rows[rows.metric.isin(["density", "attention_fraction", "error_norm"])]
    exact, skewed = (
        rows[rows.method == str(parse_spec(spec))].drop(columns="method").reset_index(drop=True)
        for spec in specs
    )
    pd.testing.assert_frame_equal(exact, skewed, check_exact=False, rtol=0, atol=0.02)
    assert (exact[exact.metric == "density"]["mean"] < 0.9).all()


def test_shares_are_shares() -> None:
    with pytest.raises(RetraceError, match=r"columns=0\.0: expected more than 0, up to 1"):
        parse_spec("infinigen:columns=0.0")
