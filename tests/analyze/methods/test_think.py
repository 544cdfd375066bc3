"""ThinK against its definition, one query at a time in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import analyze, parse_spec
from retrace.traces import LayerRules, RetraceError, Trace

MakeTrace = Callable[..., Trace]
END, WINDOW, RECENT = 30, 6, 5


@pytest.mark.parametrize("k", [3, 60])
def test_figures(
    make_trace: MakeTrace,
    any_rules: LayerRules,
    expected: Any,
    queries_of: Any,
    assert_figures: Any,
    k: int,
) -> None:
    """Of some keys, and of all, as published: half the channels of all but the recent are gone."""
    trace = make_trace(any_rules, [60])
    seen = [query for group in queries_of(trace) for query in group if query.position < END]

    def pruned(query: Any) -> Any:
        """What a query has, with the keys of its kv head pruned."""
        peers = [
            one
            for one in seen
            if one.head // any_rules.group == query.head // any_rules.group
            and one.position >= END - WINDOW
        ]
        weight = np.mean([one.query**2 for one in peers], axis=0)
        weight *= (query.keys[:END] ** 2).mean(axis=0)
        keys = query.keys.copy()
        keys[: END - RECENT, np.argsort(weight, kind="stable")[: len(weight) // 2]] = 0
        return type(query)(
            query.rules, query.head, query.position, query.query, query.group, keys, query.values
        )

    def aux(query: Any) -> float:
        visible = len(query.visible)
        gone = min(visible, END - RECENT) * (any_rules.key_dim // 2)
        return float(2 * (visible * any_rules.key_dim - gone) + any_rules.key_dim / 8)

    spec = f"think:window={WINDOW},recent={RECENT}"
    results = analyze(trace, [spec], [k], protocol=f"prefix:{END}", min_context=0, keep_exact=False)
    figures = expected(
        trace,
        lambda query, k: pruned(query).top(k),
        k,
        first=END,
        aux=aux,
        holds_keys=True,
        output=lambda query, ids: pruned(query).renormalised(ids),
    )
    assert_figures(results, spec, k, figures)


def test_all_channels_are_exact(make_trace: MakeTrace, any_rules: LayerRules) -> None:
    trace = make_trace(any_rules, [60, 40])
    specs = ["exact", "think:ratio=0.0"]
    rows = analyze(trace, specs, [4, 9], min_context=0, keep_exact=False).metrics
    exact, think = (
        rows[rows.method == spec].drop(columns="method").reset_index(drop=True) for spec in specs
    )
    pd.testing.assert_frame_equal(exact, think, check_exact=False, rtol=1e-5, atol=1e-6)


def test_the_error_grows_with_the_ratio(make_trace: MakeTrace, rules: Any) -> None:
    specs = [f"think:recent=0,ratio={ratio}" for ratio in (0.25, 0.5, 0.75)]
    trace = make_trace(rules(heads=4), [60])
    rows = analyze(trace, specs, [60], min_context=20, keep_exact=False).metrics
    rows = rows[rows.metric == "error_norm"]
    errors = [rows[rows.method == str(parse_spec(spec))]["mean"].mean() for spec in specs]
    assert 0.01 < errors[0] < errors[1] < errors[2]


def test_some_channels_stay() -> None:
    with pytest.raises(RetraceError, match=r"ratio=1\.0: expected 0 or more, and less than 1"):
        parse_spec("think:ratio=1.0")
