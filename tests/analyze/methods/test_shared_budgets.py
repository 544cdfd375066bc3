"""Budgets that the heads of a layer, or all layers, share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch

from retrace.analyze import Past, analyze, parse_spec
from retrace.analyze.methods.adakv import AdaKV
from retrace.analyze.methods.pyramidkv import PyramidKV
from retrace.analyze.units.unit import load_units
from retrace.traces import LayerRules, RetraceError, Trace

MakeTrace = Callable[..., Trace]
Rules = Callable[..., LayerRules]
Array = npt.NDArray[np.float64]
END = 41
KS = [1, 2, 3, 7, 8, 9, 13, 20, 40, 50]


def pasts(trace: Trace, layer: int = 0) -> list[Past]:
    units = load_units(trace.layer(layer), 0, torch.device("cpu"))
    return [Past(unit, 0, END) for unit in units]


def allowances(method: Any, past: Past) -> npt.NDArray[np.int64]:
    """(budgets, group or 1)"""
    ks = torch.tensor(KS)[:, None, None]
    given: npt.NDArray[np.int64] = method.allowance(method.build(past), ks).numpy()[..., 0]
    return given


def kept_by_hand(scores: Array, k: int, floor: float, share: str) -> list[int]:
    """Keys kept by each head of importance (heads, keys), one pooled list walked from the top."""
    heads, keys = scores.shape
    everything = [(-scores[h, j], h, j) for h in range(heads) for j in range(keys)]
    kept: list[set[int]] = [set() for _ in range(heads)]
    if share == "least":
        for h in range(heads):
            ranked = sorted(range(keys), key=lambda j: (-scores[h, j], j))
            kept[h] = set(ranked[: int(floor * k)])
    room = k * heads - sum(map(len, kept))
    for _, h, j in sorted(everything):
        if room and j not in kept[h]:
            kept[h].add(j)
            room -= 1
    if share == "least":
        return [len(each) for each in kept]
    return [round((1 - floor) * len(each) + floor * k) for each in kept]


@pytest.mark.parametrize("share", ["blend", "least"])
@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("pool", ["mean", "none"])
def test_heads_share(
    make_trace: MakeTrace, rules: Rules, pool: str, floor: float, share: str
) -> None:
    heads = pasts(make_trace([rules(heads=6, kv_heads=3)], [60]))
    method = parse_spec(f"adakv:window=8,floor={floor},share={share},pool={pool}").method
    assert isinstance(method, AdaKV)
    importance = np.concatenate([method.importance(past).double().numpy() for past in heads])
    if pool == "mean":
        importance = importance.reshape(3, 2, END).mean(axis=1)
    found = np.concatenate([allowances(method, past) for past in heads], axis=1)
    assert (np.diff(found, axis=0) >= 0).all()
    for k, counts in zip(KS, found, strict=True):
        if k >= END:  # there is no more than all
            assert (counts >= END).all()
            continue
        assert counts.tolist() == kept_by_hand(importance, k, floor, share)
        assert abs(counts.sum() - k * len(counts)) <= (len(counts) / 2 if share == "blend" else 0)
    if floor == 0:
        assert len(set(found[KS.index(20)])) > 1  # or there would be nothing to share


def test_one_head_has_the_best(make_trace: MakeTrace, rules: Rules, tensors: Any) -> None:
    """Of a head that attends evenly nothing is among the best, so that the floor is all it has."""
    layer = rules(heads=2, kv_heads=2)
    query, key, value = tensors(layer, 60, np.random.default_rng(0))
    query[1] = 0
    query[0] *= 0.1
    key[1] *= 0.01
    trace = make_trace([layer], [60], tensors={(0, 0): (query, key, value)}, name="uneven")
    method = parse_spec("adakv:window=1,kernel=1,share=least").method
    peaked, even = (allowances(method, past)[KS.index(20), 0] for past in pasts(trace))
    assert peaked + even == 40
    assert min(peaked, even) >= 4


def figures(trace: Trace, specs: list[str], ks: list[int]) -> list[pd.DataFrame]:
    rows = analyze(trace, specs, ks, protocol="prefix:30", min_context=0, keep_exact=False).metrics
    return [
        rows[rows.method == str(parse_spec(spec))].drop(columns="method").reset_index(drop=True)
        for spec in specs
    ]


@pytest.mark.parametrize("share", ["blend", "least"])
def test_all_floor_is_snapkv(make_trace: MakeTrace, any_rules: LayerRules, share: str) -> None:
    trace = make_trace([any_rules, any_rules], [60, 40])
    snapkv, adakv = figures(
        trace, ["snapkv:window=4", f"adakv:window=4,floor=1,share={share}"], [1, 3, 9]
    )
    pd.testing.assert_frame_equal(snapkv, adakv)


def test_as_many_keys_are_read(make_trace: MakeTrace, rules: Rules) -> None:
    """Heads differ, and all of them together attend what SnapKV's do."""
    trace = make_trace([rules(heads=6, kv_heads=3)], [60])
    snapkv, adakv = (
        frame[frame.metric == "density"]["mean"].to_numpy()
        for frame in figures(trace, ["snapkv:window=4", "adakv:window=4,share=least"], [9])
    )
    assert adakv.std() > 0.001 and snapkv.std() < 1e-9
    assert adakv.mean() == pytest.approx(snapkv.mean())


def test_layers_share(make_trace: MakeTrace, rules: Rules) -> None:
    trace = make_trace([rules()] * 5, [60])
    method = parse_spec("pyramidkv:window=8,beta=4").method
    assert isinstance(method, PyramidKV)
    given = np.array([allowances(method, pasts(trace, layer)[0])[:, 0] for layer in trace.layers]).T
    assert (np.diff(given, axis=0) >= 0).all()
    for k, budgets in zip(KS, given, strict=True):
        assert budgets.sum() == pytest.approx(5 * k, abs=2.5)
        if k <= 8:
            assert (budgets == k).all()
        # Between the last layer's part and what there is.
        assert abs(np.diff(budgets, 2)).max() <= 1
    at_20 = given[KS.index(20)]
    assert at_20.tolist() == [29, 24, 20, 16, 11]  # 8 + 12 (7/4, 11/8, 1, 5/8, 1/4)
    assert given[KS.index(40)].tolist() == [41, 40, 40, 40, 39]  # the first has no more than all


@pytest.mark.parametrize("k", [9, 13, 20, 33])
def test_the_step_between_layers_as_the_published_code_rounds_it(
    make_trace: MakeTrace, rules: Rules, k: int
) -> None:
    """Down, so that its layers keep a few keys more than k on average, as the docstring says."""
    trace, window, beta, layers = make_trace([rules()] * 5, [60]), 8, 4, 5
    mean = k - window
    first = min(2 * mean - mean // beta, END - window)
    step = (first - (2 * mean - first)) // (layers - 1)
    published = np.array([window + first - layer * step for layer in range(layers)])
    method = parse_spec(f"pyramidkv:window={window},beta={beta}").method
    ks = torch.tensor([k])[:, None, None]
    ours = np.array(
        [int(method.allowance(method.build(pasts(trace, i)[0]), ks)) for i in trace.layers]
    )
    assert ours.mean() == pytest.approx(k, abs=0.5)
    assert 0 <= published.mean() - k <= (layers - 1) / 2
    assert np.abs(published - ours).max() <= layers


def test_one_layer_has_nobody_to_share_with(make_trace: MakeTrace, rules: Rules) -> None:
    trace = make_trace([rules(heads=4)], [60])
    snapkv, pyramidkv = figures(trace, ["snapkv:window=4", "pyramidkv:window=4"], [3, 9])
    pd.testing.assert_frame_equal(snapkv, pyramidkv)


def test_shares_are_shares() -> None:
    with pytest.raises(RetraceError, match=r"floor=1\.5: expected a share between 0 and 1"):
        parse_spec("adakv:floor=1.5")
