"""Completion by linear attention against the sums that a decoder would keep, in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze import Past, analyze
from retrace.analyze.methods.linear_completion import LinearCompletion
from retrace.analyze.units.unit import load_units
from retrace.traces import LayerRules, Trace

MakeTrace = Callable[..., Trace]
MakeRules = Callable[..., LayerRules]
LENGTH = 60


def past_of(trace: Trace, sequence: int, learned: dict[str, torch.Tensor]) -> Past:
    unit = next(load_units(trace.layer(0), sequence, torch.device("cpu")))
    return Past(unit, 0, len(unit.keys), learned)


@pytest.mark.parametrize("changes", [{}, {"window": 20, "softcap": 8.0, "sinks": (0.5, 1.0) * 2}])
def test_output_from_sums_of_fixed_size(
    make_trace: MakeTrace, rules: MakeRules, changes: dict[str, object]
) -> None:
    """Of every query, the exact keys by hand, and the rest as the sums of features over all keys
    between, less those of the keys that are attended exactly."""
    layer = rules(heads=4, value_dim=5, **changes)
    trace = make_trace([layer], [LENGTH, LENGTH])
    method = LinearCompletion(features=6, sink=2, recent=4, best=8, steps=20)
    learned = method.calibrate([past_of(trace, 1, {})])
    past = past_of(trace, 0, learned)
    k = 3
    output, ids = method.attend(method.build(past), past.queries, torch.arange(LENGTH), k)
    w = {name: tensor.double().numpy() for name, tensor in learned.items()}
    keys, values = (t.double().numpy() for t in (past.keys, past.values))
    features = np.exp(keys @ w["key"])
    for head, queries in enumerate(past.queries.double().numpy()):
        for i, query in enumerate(queries):
            logits = keys @ query
            if layer.softcap is not None:
                logits = layer.softcap * np.tanh(logits / layer.softcap)
            seen = range(layer.first_visible(i), i + 1)
            near = [j for j in seen if j < 2 or j > i - 4]
            between = [j for j in seen if j not in near]
            chosen = sorted(between, key=lambda j: (-logits[j], j))[:k]
            asked = np.exp(query @ w["query"][head] + w["offset"][head, 0])
            sums, masses = np.zeros((6, 5)), np.zeros(6)
            for j in between:
                sums += np.outer(features[j], values[j])
                masses += features[j]
            for j in chosen:
                sums -= np.outer(features[j], values[j])
                masses -= features[j]
            exact = near + chosen
            weights = np.exp(logits[exact])
            total = weights.sum() + asked @ masses
            if layer.sinks is not None:
                total += np.exp(layer.sinks[head])
            wanted = (weights @ values[exact] + asked @ sums) / total
            np.testing.assert_allclose(output[head, i].double().numpy(), wanted, atol=1e-4)
            assert {j for j in ids[head, i].tolist() if j >= 0} == set(exact)


def test_fitted_to_what_is_left_out(make_trace: MakeTrace, rules: MakeRules, tensors: Any) -> None:
    """On a sequence whose keys have the same mean, and whose logits are all lower by 6: nearer to
    exact attention than without learning, and than by leaving out the rest."""
    layer = rules(heads=4)
    drawn = tensors(layer, 500, np.random.default_rng(0))
    drawn[0][..., -1], drawn[1][..., -1] = -12, 1
    parts = (slice(300, 500), slice(0, 300))
    given = {(0, i): tuple(t[:, part] for t in drawn) for i, part in enumerate(parts)}
    trace = make_trace([layer], [200, 300], tensors=given)
    specs = [f"linear-completion:features=8,recent=8,steps={steps}" for steps in (0, 100)]
    # The last attends as many keys as the others, with the sinks and the recent ones.
    rows = [
        analyze(
            trace, [spec], [k], min_context=40, calibration_sequences=[1], keep_exact=False
        ).metrics
        for spec, k in ((specs[0], 4), (specs[1], 4), ("exact:keep=sink:4+recent:8", 16))
    ]
    errors = [r[r.metric == "error_norm"]["mean"].mean() for r in rows]
    densities = [r[r.metric == "density"]["mean"].mean() for r in rows]
    assert densities[0] == pytest.approx(densities[2], abs=1e-6)
    assert errors[1] < 0.8 * errors[0]
    assert errors[1] < 0.7 * errors[2]


def test_fitting_is_the_same_each_time(make_trace: MakeTrace, rules: MakeRules) -> None:
    past = past_of(make_trace([rules(heads=4)], [LENGTH, LENGTH]), 1, {})
    one, same, other = (
        LinearCompletion(features=4, steps=5, seed=seed).calibrate([past]) for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["key"], other["key"])
