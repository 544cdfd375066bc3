"""KIVI against the published cache, kept token by token in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch

from retrace.analyze import Past, analyze, parse_spec
from retrace.analyze.methods.kivi import KIVI
from retrace.analyze.methods.toolkit.quantisation import rounded_in_groups
from retrace.analyze.units.unit import HeadGroup, load_units
from retrace.traces import LayerRules, RetraceError, Trace

MakeTrace = Callable[..., Trace]
Array = npt.NDArray[np.float64]
LENGTH, BITS, SIZE, RESIDUAL = 60, 2, 4, 8


def round_group(group: Array) -> Array:
    step = (group.max() - group.min()) / (2**BITS - 1)
    return group if step == 0 else group.min() + np.round((group - group.min()) / step) * step


class Cache:
    """Tokens as KIVI holds them: appended one by one, and rounded when a residual is full."""

    def __init__(self) -> None:
        self.few_keys: list[Array] = []
        self.full_keys: list[Array] = []
        self.few_values: list[Array] = []
        self.full_values: list[Array] = []

    def add(self, key: Array, value: Array) -> tuple[Array, Array]:
        """The keys and values that the query of the new token sees."""
        self.full_keys.append(key)
        self.full_values.append(value)
        seen = (
            np.array(self.few_keys + self.full_keys),
            np.array(self.few_values + self.full_values),
        )
        if len(self.full_keys) == RESIDUAL:
            block = np.array(self.full_keys)
            for start in range(0, RESIDUAL, SIZE):
                tokens = block[start : start + SIZE]
                self.few_keys += list(np.stack([round_group(c) for c in tokens.T], axis=1))
            self.full_keys = []
        if len(self.full_values) > RESIDUAL:
            first = self.full_values.pop(0)
            self.few_values.append(
                np.concatenate(
                    [round_group(first[i : i + SIZE]) for i in range(0, len(first), SIZE)]
                )
            )
        return seen


@pytest.fixture
def trace(make_trace: MakeTrace, any_rules: LayerRules, tensors: Any) -> Trace:
    """A sequence without ties, which rounding would turn."""
    rng = np.random.default_rng(3)
    given = [t + 0.01 * rng.normal(size=t.shape) for t in tensors(any_rules, LENGTH, rng)]
    return make_trace(any_rules, [LENGTH], tensors={(0, 0): tuple(given)}, name="uneven")


@pytest.mark.parametrize("k", [5, LENGTH])
def test_output(trace: Trace, queries_of: Any, k: int) -> None:
    """Of the best few, and of all, as published."""
    method = parse_spec(f"kivi:bits={BITS},size={SIZE},residual={RESIDUAL}").method
    assert isinstance(method, KIVI)
    groups = queries_of(trace)
    for kv_head, unit in enumerate(load_units(trace.layer(0), 0, torch.device("cpu"))):
        past = Past(unit, 0, LENGTH)
        positions = torch.arange(LENGTH)
        output, ids = method.attend(method.build(past), past.queries, positions, k)
        cache = Cache()
        for position in range(LENGTH):
            group = groups[kv_head * LENGTH + position]
            keys, values = cache.add(group[0].keys[position], group[0].values[position])
            for place, query in enumerate(group):
                held = type(query)(
                    query.rules, query.head, position, query.query, query.group, keys, values
                )
                wanted = held.top(k)
                found = [j for j in ids[place, position].tolist() if j >= 0]
                assert found == wanted
                np.testing.assert_allclose(
                    output[place, position].numpy(), held.renormalised(wanted), atol=2e-5
                )


def test_many_bits_are_exact(trace: Trace) -> None:
    rows = analyze(
        trace, ["exact", "kivi:bits=16,size=4,residual=8"], [4, 60], min_context=0, keep_exact=False
    ).metrics
    rows = rows[rows.metric.isin(["error_norm", "attention_fraction", "density"])]
    exact, kivi = (
        frame.drop(columns="method").reset_index(drop=True)
        for _, frame in rows.groupby("method", sort=True)
    )
    pd.testing.assert_frame_equal(exact, kivi, check_exact=False, rtol=0, atol=1e-3)


def test_fewer_bits_are_worse(make_trace: MakeTrace, rules: Any) -> None:
    trace = make_trace(rules(heads=4), [60])
    errors = []
    for bits in (1, 2, 4, 8):
        spec = f"kivi:bits={bits},size=4,residual=4"
        rows = analyze(trace, [spec], [60], min_context=20, keep_exact=False).metrics
        errors.append(rows[rows.metric == "error_norm"]["mean"].mean())
    assert errors[0] > errors[1] > errors[2] > errors[3] > 0
    assert errors[3] < 0.01 < errors[1]


def test_a_group_need_not_be_full() -> None:
    vectors = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    back = rounded_in_groups(vectors, BITS, 4)
    for row, found in zip(vectors.double().numpy(), back.numpy(), strict=True):
        wanted = np.concatenate([round_group(row[i : i + 4]) for i in (0, 4, 8)])
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert rounded_in_groups(vectors[:, :0], BITS, 4).shape == (3, 0)


def test_bytes(rules: Any) -> None:
    """128 channels in 2 bits with 4 scales and offsets of 2 bytes are 48 bytes a token."""
    group = HeadGroup(0, 0, 0, rules(key_dim=128, value_dim=128), 2)
    method = KIVI()
    assert method.attended_bytes(group) == 48
    read = torch.as_tensor(method.aux_bytes(None, torch.tensor([100, 128, 129, 1000]), group))
    newest = [100, 128, 129, 129]  # values in full
    full = [100, 128, 1, 104]  # keys in full
    few = [0, 0, 128, 896]
    wanted = [a * 256 + b * 256 + c * 48 for a, b, c in zip(newest, full, few, strict=True)]
    assert read.tolist() == wanted


def test_whole_groups_are_rounded() -> None:
    with pytest.raises(RetraceError, match="residual=100: expected a multiple of 32"):
        parse_spec("kivi:residual=100")
