"""Scores of any size that float32 holds: figures as float64 gives them, or a refusal by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import analyze
from retrace.analyze.exact.reference import exact_pass
from retrace.analyze.units.attention import attend
from retrace.analyze.units.unit import Block, HeadGroup, Unit, load_units
from retrace.traces import LayerRules, RetraceError, Trace

pytestmark = pytest.mark.usefixtures("untried")
MakeTrace = Callable[..., Trace]
LENGTH = 70
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 50.0},
    "sinks and window": {"sinks": (3.0, -1.0, 40.0, 5.0), "window": 40},
}


def tensors_of(rules: LayerRules, size: float, offset: float) -> tuple[Any, Any, Any]:
    """Queries and keys of some size, off any grid; `offset` is a part that all keys share."""
    draw = np.random.default_rng(3).normal
    heads = (rules.heads, rules.kv_heads, rules.kv_heads)
    query, key, value = (draw(size=(h, LENGTH, 8)) for h in heads)
    return size * query, size * key + offset * draw(size=8), value


@pytest.mark.parametrize("size, offset", [(1, 0), (1, 200), (1e3, 1e3), (1e9, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_float64(
    make_trace: MakeTrace,
    rules: Any,
    expected: Any,
    assert_figures: Any,
    kind: str,
    size: float,
    offset: float,
) -> None:
    layer = rules(heads=4, kv_heads=2, **KINDS[kind])
    if layer.softcap is not None and size > 1e5:
        size = 1e5  # products of which float64 tells no score below the bound are refused
    if layer.sinks is not None:
        offset = 0  # or all products may be so low that a sink leaves no output in float32
    tensors = {(0, 0): tensors_of(layer, size, offset)}
    trace = make_trace(layer, [LENGTH], tensors=tensors, name="own")
    chosen = {
        "exact": lambda query, k: query.top(k),
        "dense": lambda query, k: query.top(LENGTH),
        # Often without the key that has all of the attention.
        "window:keep=recent:1": lambda query, k: sorted(query.visible, reverse=True)[:k],
    }
    for keep in (False, True, True):
        results = analyze(trace, list(chosen), [4], min_context=20, keep_exact=keep, workers=1)
        for method, select in chosen.items():
            figures = expected(trace, select, 4, first=20)
            compared = ["attention_fraction", "exact_attention_fraction"]
            compared += ["recall"] if method != "dense" else []  # which ranks by its own scores
            assert_figures(results, method, 4, figures.loc[compared], atol=1e-6)
            assert_figures(results, method, 4, figures.loc[["error_norm"]], atol=1e-4)
    most = results.metrics.loc[results.metrics["metric"] == "attention_fraction", "mean"].max()
    assert most <= 1 + 1e-6


def test_where_float64_is_too_coarse_the_first_query_is_named(
    make_trace: MakeTrace, rules: Any
) -> None:
    layer = rules(heads=2, kv_heads=1)
    query, key, value = tensors_of(layer, 1e8, 0)
    key[:, 31] = key[:, 30]  # alike, so that the attention between them is in the last digits
    query[:, 40] = key[:, 31]
    trace = make_trace(layer, [LENGTH], tensors={(0, 0): (query, key, value)}, name="own")
    for keep in (True, False, True):
        with pytest.raises(RetraceError, match="layer 0, head 0, sequence 0, position 40 are as"):
            analyze(trace, ["dense", "quest"], [2], min_context=0, keep_exact=keep, workers=1)
    # Nothing of it is kept, and queries that do not count stop nothing.
    assert not list(trace.path.with_name("own.exact").rglob("*.npz"))
    first = query[:, 41:] * 0 + key[:, :1]
    query[:, 41:] = first
    counted = analyze(trace, ["exact"], [2], min_context=60, workers=1)
    assert counted.metrics["mean"].notna().any()


@pytest.mark.parametrize("sinks", [None, (2.0, 300.0)])
def test_the_exact_output_is_that_of_float64(sinks: tuple[float, ...] | None) -> None:
    rules = LayerRules("layer", 2, 1, 8, 8, 0.5, sinks=sinks)
    query, key, value = (torch.from_numpy(t).float() for t in tensors_of(rules, 300.0, 0))
    learned = None if sinks is None else torch.tensor(sinks)
    unit = Unit(
        HeadGroup(0, 0, 0, rules, 4), query, torch.arange(LENGTH), key[0], value[0], learned
    )
    found = exact_pass(Block(unit, slice(0, LENGTH)), 3).output
    wide = (t.double() for t in (query, key[0], value[0]))
    wanted = attend(*wide, unit.positions, rules, learned)
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=1e-6)


def test_ordinary_scores_are_answered_in_float32(
    make_trace: MakeTrace, rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = next(load_units(make_trace(rules()).layer(0), 0, torch.device("cpu")))
    monkeypatch.setattr("retrace.analyze.exact.reference._answer_in_float64", lambda *_: 1 / 0)
    block = Block(unit, slice(0, len(unit.positions)))
    exact_pass(block, 3)
    with pytest.raises(ZeroDivisionError):
        exact_pass(
            Block(
                Unit(unit.group, unit.queries * 1e4, *list(vars(unit).values())[2:7]), block.rows
            ),
            3,
        )
