"""Expected attention against its definition in float64, and against what it is an estimate of."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from retrace.analyze import Past, parse_spec
from retrace.analyze.methods.expected_attention import ExpectedAttention
from retrace.analyze.units.unit import load_units
from retrace.traces import LayerRules, RetraceError, Rotation, Trace

MakeTrace = Callable[..., Trace]
Rules = Callable[..., LayerRules]
Array = npt.NDArray[np.float64]
END, FUTURE, SINK = 50, 12, 4
ROTATIONS = {
    "half": Rotation((1.0, 0.3, 0.1, 0.02)),
    "partial": Rotation((1.0, 0.3), first=2),
    "interleaved": Rotation((1.0, 0.3, 0.1), pairing="interleaved"),
    "scaled": Rotation((1.0, 0.3, 0.1), scaling=1.3),
    "none": Rotation(),
}


def past_of(trace: Trace, end: int = END) -> Past:
    return Past(list(load_units(trace.layer(0), 0, torch.device("cpu")))[1], 0, end)


def importance(spec: str, past: Past) -> Array:
    method = parse_spec(spec).method
    assert isinstance(method, ExpectedAttention)
    return method.importance(past).double().numpy()


def matrix(rotation: Rotation, position: int) -> Array:
    """The rotation of one position, pair by pair."""
    turn = np.eye(8)
    for (a, b), frequency in zip(rotation.pairs(), rotation.frequencies, strict=True):
        angle = position * frequency
        cos, sin = rotation.scaling * np.cos(angle), rotation.scaling * np.sin(angle)
        turn[[a, a, b, b], [a, b, a, b]] = cos, -sin, sin, cos
    return turn


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS.keys())
@pytest.mark.parametrize("options", ["", ",covariance=false", ",norm=false", ",eps=0.02"])
def test_definition(make_trace: MakeTrace, rules: Rules, rotation: Rotation, options: str) -> None:
    layer = rules(heads=4, rotation=rotation, scale=0.2)
    past = past_of(make_trace([layer], [60]))
    found = importance(f"expected-attention:future={FUTURE}{options}", past)
    keys, values = past.keys.double().numpy(), past.values.double().numpy()
    turn = np.mean([matrix(rotation, p) for p in range(END, END + FUTURE)], axis=0)
    for head in range(2):
        turned = 0.2 * past.unit.queries[head, :END].double().numpy()
        queries = np.stack(
            [np.linalg.inv(matrix(rotation, p)) @ turned[p] for p in range(SINK, END)]
        )
        mean = turn @ queries.mean(axis=0)
        covariance = turn @ np.cov(queries.T, bias=True) @ turn.T
        logits = keys @ mean
        if "covariance" not in options:
            logits += np.einsum("ji,ik,jk->j", keys, covariance, keys) / 2
        attention = np.exp(logits[SINK:] - logits[SINK:].max())
        wanted = attention / attention.sum() + (0.02 if "eps" in options else 0)
        if "norm" not in options:
            wanted *= np.linalg.norm(values[SINK:], axis=1)
        np.testing.assert_allclose(found[head, SINK:], wanted, rtol=2e-4, atol=1e-7)


def test_expectation(make_trace: MakeTrace, rules: Rules) -> None:
    """Of queries that are normal indeed, with nothing turned: the mean of exp(q.k) of many more."""
    rng = np.random.default_rng(0)
    layer = rules(heads=2, rotation=Rotation(), scale=1.0)
    mix, shift = 0.15 * rng.normal(size=(8, 8)), 0.5 * rng.normal(size=8)
    query = rng.normal(size=(2, 4000, 8)) @ mix + shift
    key, value = rng.normal(size=(2, 2, 4000, 8))
    trace = make_trace([layer], [4000], tensors={(0, 0): (query, key, value)}, name="normal")
    found = importance("expected-attention:keep=none,norm=false", past_of(trace, 4000))
    later = rng.normal(size=(200_000, 8)) @ mix + shift
    keys = key[1, :50]
    wanted = np.exp(later @ keys.T).mean(axis=0)
    ratio = found[0, :50] / wanted
    np.testing.assert_allclose(ratio / ratio.mean(), 1, atol=0.15)
    assert np.corrcoef(np.log(found[0, :50]), np.log(wanted))[0, 1] > 0.999
    plain = importance("expected-attention:keep=none,norm=false,covariance=false", past_of(trace))
    assert np.corrcoef(np.log(plain[0, :50]), np.log(wanted))[0, 1] < 0.995


def test_needs_queries(make_trace: MakeTrace, rules: Rules) -> None:
    layer = rules(rotation=Rotation())
    trace = make_trace([layer], [60], queries=[range(55, 60)], name="late")
    with pytest.raises(RetraceError, match="needs queries at positions 4 to 49"):
        importance("expected-attention", past_of(trace))
    with pytest.raises(RetraceError, match="before position encoding"):
        importance("expected-attention", past_of(make_trace([rules()], [60])))


def test_sinks_stay(make_trace: MakeTrace, rules: Rules) -> None:
    """They come first by being kept, not by their importance."""
    found = importance(
        "expected-attention", past_of(make_trace([rules(rotation=Rotation())], [60]))
    )
    assert (found[:, :SINK] == 0).all() and (found[:, SINK:] > 0).all()
