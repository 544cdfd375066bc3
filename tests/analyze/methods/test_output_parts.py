"""The parts that methods put outputs together from, against plain float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import Past
from retrace.analyze.methods.toolkit.partial_attention import (
    attend_ids,
    logits_at,
    merged,
    part,
    visible_logits,
)
from retrace.analyze.units.unit import load_units
from retrace.traces import LayerRules, Rotation, Trace

MakeTrace = Callable[..., Trace]


def pasts(trace: Trace) -> list[Past]:
    """Every kv head's whole first sequence."""
    units = load_units(trace.layer(0), 0, torch.device("cpu"))
    return [Past(unit, 0, len(unit.keys)) for unit in units]


def test_some_keys(make_trace: MakeTrace, any_rules: LayerRules, queries_of: Any) -> None:
    """Renormalised over three keys, as importance weights have it, and over all in two parts."""
    trace = make_trace(any_rules, [40])
    positions = torch.arange(3, 40)
    ids = torch.stack([positions, positions - 1, torch.full_like(positions, -1)], dim=-1)
    log_pi = torch.tensor([0.0, -1.5, 0.0]).expand(ids.shape)
    for kv_head, past in enumerate(pasts(trace)):
        queries = past.queries[:, 3:]
        every = ids.expand(len(queries), -1, -1)
        plain = attend_ids(past, queries, every)
        weighted = attend_ids(past, queries, every, log_pi.expand(every.shape))
        logits = visible_logits(past, queries, positions)
        halves = [
            part(logits[..., :20], past.values[:20]),
            part(logits[..., 20:], past.values[20:]),
        ]
        whole = merged(halves, past.unit.sinks)
        for group in queries_of(trace)[kv_head * 40 + 3 : kv_head * 40 + 40]:
            for place, query in enumerate(group):
                row, i = query.position - 3, query.position
                visible = [j for j in (i, i - 1) if j in query.visible]
                assert set(visible) == {i, i - 1} or query.rules.chunk
                keys = np.array([i, i - 1])
                dots = query.rules.scale * (query.keys[keys] @ query.query)
                if query.rules.softcap:
                    dots = query.rules.softcap * np.tanh(dots / query.rules.softcap)
                for found, inverse in ((plain, [1, 1]), (weighted, [1, np.exp(1.5)])):
                    weights = np.exp(dots) * inverse
                    wanted = weights @ query.values[keys] / (weights.sum() + query.sink)
                    np.testing.assert_allclose(found[place, row], wanted, atol=1e-5)
                np.testing.assert_allclose(whole[place, row], query.output, atol=1e-5)


def test_large_logits_and_no_keys(make_trace: MakeTrace, rules: Any) -> None:
    """Nothing overflows, and nothing attended gives zeros."""
    past = pasts(make_trace(rules(), [40]))[0]
    queries = past.queries[:, :5] * 1e4
    none = torch.full((*queries.shape[:2], 2), -1)
    assert (attend_ids(past, queries, none) == 0).all()
    assert logits_at(queries, past.keys, none, past.group.rules).isneginf().all()
    some = torch.arange(2).expand(none.shape)
    assert attend_ids(past, queries, some).isfinite().all()


def test_a_cluster_is_a_key_of_its_size(make_trace: MakeTrace, rules: Any) -> None:
    """Three equal keys are one whose logit is larger by log 3, its value their mean."""
    logits, values = torch.tensor([[[0.7, 0.7, 0.7, -0.2]]]), torch.randn(4, 5)
    whole = merged([part(logits, values)])
    cluster = part(torch.tensor([[[0.7 + float(np.log(3.0))]]]), values[:3].mean(dim=0)[None])
    rest = part(logits[..., 3:], values[3:])
    torch.testing.assert_close(merged([cluster, rest]), whole)


def test_what_a_past_holds(make_trace: MakeTrace, rules: Any) -> None:
    """Up to its end, in other heads and layers too; rotation undone; attention as it was."""
    layer = rules(heads=4, rotation=Rotation((1.0, 0.3)), sinks=(0.0, 1.0, 2.0, 3.0))
    trace = make_trace([layer, layer], [50], queries=[range(0, 50, 2)])
    unit = list(load_units(trace.layer(1), 0, torch.device("cpu")))[1]
    past = Past(unit, 0, 31)
    assert past.keys.shape == (31, 8) and past.queries.shape == (2, 16, 8)
    assert past.query_positions.tolist() == list(range(0, 31, 2))
    assert past.layers == (0, 1) and len(past.heads) == 2
    assert all(p.end == 31 and len(p.keys) == 31 for p in (*past.heads, *past.layer(0)))
    torch.testing.assert_close(past.heads[1].keys, past.keys)
    np.testing.assert_array_equal(past.layer(0)[1].keys, trace.layer(0).key(0)[1, :31])
    before = trace.layer(1).key(0, rotated=False)[1, :31]
    np.testing.assert_allclose(past.keys_before_rotation, before, atol=1e-6)
    torch.testing.assert_close(past.rotated(past.keys_before_rotation, torch.arange(31)), past.keys)
    scaled = layer.scale * trace.layer(1).query(0, rotated=False)[2:, :16]
    np.testing.assert_allclose(past.queries_before_rotation, scaled, atol=1e-5)
    attention = past.attention(slice(-3, None))
    assert attention.shape == (2, 3, 31) and (attention[:, 0, 27:] == 0).all()
    full = torch.exp(past.queries[:, -1:] @ past.keys.T)
    total = full.sum(dim=-1, keepdim=True) + past.unit.sinks.exp()[:, None, None]  # type: ignore[union-attr]
    torch.testing.assert_close(attention[:, -1:], full / total)


@pytest.mark.parametrize("k", [1, 50, 2000])
def test_samples_have_the_exact_mean(make_trace: MakeTrace, rules: Any, k: int) -> None:
    """oracle-sample is unbiased: its error falls as 1 / sqrt(k)."""
    from retrace.analyze.methods.oracle_sample import OracleSample

    past = pasts(make_trace(rules(sinks=(0.5, 1.0)), [40]))[0]
    positions = torch.tensor([39])
    queries = past.queries[:, 39:]
    logits = visible_logits(past, queries, positions)
    exact = merged([part(logits, past.values)], past.unit.sinks)
    draws = torch.stack(
        [OracleSample(seed=s).attend(past, queries, positions, k)[0] for s in range(200)]
    )
    error = (draws.mean(dim=0) - exact).abs().max()
    assert error < 5 * float(past.values.abs().max()) / (200 * k) ** 0.5
