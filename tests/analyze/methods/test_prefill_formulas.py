"""XAttention, MInference's vertical-slash and FlexPrefill against their published formulas, written
apart in float64: the same units of keys, but for what rounding to float32 may bring in."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from benchmarks.science.prefill_equality import Formula, compare
from benchmarks.science.prefill_formulas import Array, flexprefill, vertical_slash, xattention
from retrace.traces import Trace

MakeTrace = Callable[..., Trace]
LENGTH, SIZE = 331, 16


def structured(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Heads with a few columns, with diagonals, with blocks that belong together, and with sinks
    and recent keys only."""
    turns = np.arange(LENGTH)[:, None] * np.array([0.07, 0.31, 0.9, 1.7])
    circling = np.concatenate([np.cos(turns), np.sin(turns)], axis=-1)
    topics = rng.normal(size=(5, 8))[rng.integers(5, size=-(-LENGTH // SIZE))]
    keys = 0.5 * rng.normal(size=(4, LENGTH, 8))
    queries = 0.5 * rng.normal(size=(4, LENGTH, 8))
    queries[0] += 1.0
    keys[0, [0, 1, 33, 90, 91, 200]] += 1.5
    queries[1] += 1.3 * circling
    keys[1] += 1.3 * circling
    belonging = topics.repeat(SIZE, axis=0)[:LENGTH]
    queries[2] += 1.5 * belonging
    keys[2] += 1.5 * belonging
    queries[3, :, 0] += 2.0
    keys[3, :4, 0] += 3.0
    queries[3, :, 1:3] += 3 * circling[:, [0, 4]]
    keys[3, :, 1:3] += 3 * circling[:, [0, 4]]
    return queries, keys, rng.normal(size=(4, LENGTH, 8))


@pytest.fixture
def traces(make_trace: MakeTrace, rules: Any) -> dict[str, Trace]:
    """Structured attention; and random, of grouped heads, with sums that are equal."""
    tensors = {(0, 0): structured(np.random.default_rng(3))}
    layer = rules(heads=4, kv_heads=4, key_dim=8)
    grouped = rules(heads=4, kv_heads=2, key_dim=8)
    return {
        "structured": make_trace(layer, [LENGTH], tensors=tensors, name="structured"),
        "random": make_trace(grouped, [203], seed=5),
    }


CASES: dict[str, tuple[str, int, int, Formula]] = {
    "xattention": (
        "xattention:block=16,stride=4",
        LENGTH,
        16,
        partial(xattention, block=16, stride=4),
    ),
    "xattention, several blocks of keys": (
        "xattention:block=8,stride=2,budget=top-p:0.7",
        LENGTH,
        32,
        partial(xattention, block=8, stride=2, part=0.7),
    ),
    "vertical-slash": (
        "minference:pattern=vertical-slash,columns=0.3,last=20",
        150,
        16,
        partial(vertical_slash, k=150, columns=0.3, last=20),
    ),
    "vertical-slash, narrow": (
        "minference:pattern=vertical-slash,columns=0.6,last=6",
        60,
        8,
        partial(vertical_slash, k=60, columns=0.6, last=6),
    ),
    "flexprefill": (
        "flexprefill:block=16,least=32",
        LENGTH,
        16,
        partial(flexprefill, block=16, least=32),
    ),
    "flexprefill, lines": (
        "flexprefill:block=8,least=16,tau=0,budget=top-p:0.7",
        LENGTH,
        16,
        partial(flexprefill, block=8, least=16, tau=0.0, part=0.7),
    ),
    "flexprefill, pooled": (
        "flexprefill:block=8,least=16,tau=1,budget=top-p:0.8",
        LENGTH,
        8,
        partial(flexprefill, block=8, least=16, tau=1.0, part=0.8),
    ),
}


@pytest.mark.parametrize("kind", ["structured", "random"])
@pytest.mark.parametrize("case", CASES)
def test_choices_are_those_of_the_formulas(traces: dict[str, Trace], case: str, kind: str) -> None:
    spec, k, rows, formula = CASES[case]
    found = compare(spec, k, rows, formula, traces[kind], [0])
    assert found.different == 0
    # Or there would be nothing to be wrong about.
    assert found.undecided < 0.01 * found.pairs
    assert 0.05 * found.pairs < found.chosen < 0.95 * found.pairs


@pytest.mark.parametrize(
    ("case", "other"),
    [
        ("xattention", partial(xattention, block=16, stride=4, part=0.8)),
        ("vertical-slash", partial(vertical_slash, k=150, columns=0.3, last=16)),
        ("flexprefill", partial(flexprefill, block=16, least=32, part=0.8)),
    ],
)
def test_other_settings_choose_otherwise(
    traces: dict[str, Trace], case: str, other: Formula
) -> None:
    """What the comparison would say of a method that is wrong."""
    spec, k, rows, _ = CASES[case]
    assert compare(spec, k, rows, other, traces["structured"], [0]).different > 0


@pytest.mark.parametrize(
    ("formula", "rows"),
    [(CASES[case][3], CASES[case][2]) for case in CASES],
    ids=list(CASES),
)
def test_rounding_leaves_in_what_is_sure(formula: Formula, rows: int) -> None:
    """Scores moved as rounding moves them, at random."""
    rng = np.random.default_rng(7)
    queries, keys, _ = structured(rng)
    for head in range(4):
        exact = formula(queries[head] * 0.5, keys[head], rows)
        moved = formula(
            queries[head] * 0.5 * (1 + 1e-7 * rng.normal(size=queries[head].shape)),
            keys[head] * (1 + 1e-7 * rng.normal(size=keys[head].shape)),
            rows,
        )
        for ours, theirs in zip(exact, moved, strict=True):
            assert ours.sure <= ours.chosen <= ours.possible
            assert ours.sure <= theirs.chosen <= ours.possible
