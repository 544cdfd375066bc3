"""Patterns of heads against their definition: pair by pair, in float64."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from retrace.analyze import Results, analyze, merge
from retrace.analyze.metrics import patterns
from retrace.analyze.metrics.patterns import PATTERNS, checked_patterns, kinds
from retrace.analyze.tables.validation import checked_table
from retrace.traces import Trace

MakeTrace = Callable[..., Trace]
QueriesOf = Callable[..., list[list[Any]]]
Pair = tuple[int, int]
SIZE = 4


def replayed(trace: Trace, size: int = SIZE, **options: Any) -> Results:
    method, protocol = f"random-blocks:block={size}", f"prefill:{size}"
    return analyze(trace, [method], [16], protocol=protocol, keep_exact=False, **options)


def masses_of(
    trace: Trace, queries_of: QueriesOf, size: int = SIZE, first: int = 0
) -> dict[tuple[int, int], tuple[dict[Pair, float], int]]:
    """By sequence and head: the mass of every pair of blocks of which a query sees a key, and how
    many queries count."""
    found: dict[tuple[int, int], dict[Pair, float]] = defaultdict(lambda: defaultdict(float))
    counts: dict[tuple[int, int], int] = defaultdict(int)
    groups = iter(queries_of(trace))
    for sequence in trace.sequences:
        for _ in range(trace.layer(0).rules.kv_heads):
            for i in range(trace.length(sequence)):
                for query in next(groups):
                    if i < first:
                        continue
                    counts[sequence, query.head] += 1
                    for j in query.visible:
                        pair = i // size, int(j) // size
                        found[sequence, query.head][pair] += query.probabilities[j]
    return {at: (pairs, counts[at]) for at, pairs in found.items()}


def best_lines(lines: Sequence[list[float]], room: float) -> float:
    """The lines of most mass by pair, the last of them in part."""
    return in_turn(sorted(lines, key=lambda line: -np.mean(line)), room)


def in_turn(lines: Sequence[list[float]], room: float) -> float:
    held = 0.0
    for line in lines:
        part = min(1.0, room / len(line))
        held += part * sum(line)
        room -= part * len(line)
    return held


def by_definition(pairs: dict[Pair, float], queries: int) -> list[float] | None:
    free = {(i, j): mass for (i, j), mass in pairs.items() if 0 < j < i}
    room = 0.1 * len(free)
    if room < 1:
        return None
    given = sum(mass for pair, mass in pairs.items() if pair not in free)
    columns, diagonals = defaultdict(list), defaultdict(list)
    for (i, j), mass in free.items():
        columns[j].append(mass)
        diagonals[i - j].append(mass)
    held = [
        0.0,
        in_turn([diagonals[far] for far in sorted(diagonals)], room),
        best_lines([*columns.values()], room),
        best_lines([*diagonals.values()], room),
        best_lines([[mass] for mass in free.values()], room),
    ]
    return [(given + part) / queries for part in held]


def expected_means(
    trace: Trace, queries_of: QueriesOf, **options: Any
) -> tuple[dict[int, np.ndarray], dict[int, int]]:
    """Mean over sequences, and how many there are, by head."""
    held = defaultdict(list)
    for (_, head), (pairs, queries) in masses_of(trace, queries_of, **options).items():
        if (found := by_definition(pairs, queries)) is not None:
            held[head].append(found)
    return (
        {head: np.mean(found, axis=0) for head, found in held.items()},
        {head: len(found) for head, found in held.items()},
    )


def best_by_definition(means: np.ndarray) -> str:
    local, vertical, slash, block = means[1:] - means[0]
    if max(local, vertical, slash) < 0.9 * block:
        return "block"
    if vertical > local and (vertical >= slash or slash <= 1.05 * local):
        return "vertical"
    return "slash" if slash > 1.05 * local else "local"


def compare(rows: pd.DataFrame, means: dict[int, np.ndarray], counts: dict[int, int]) -> None:
    assert len(rows) == len(PATTERNS) * len(means)
    for head, wanted in means.items():
        own = rows[rows["head"] == head]
        assert own["pattern"].tolist() == list(PATTERNS)
        np.testing.assert_allclose(own["mean"], wanted, rtol=1e-5)
        assert set(own["count"]) == {counts[head]}
        assert own.loc[own["best"], "pattern"].tolist() == [best_by_definition(wanted)]


def test_of_every_kind_of_layer(make_trace: MakeTrace, any_rules: Any, queries_of: Any) -> None:
    """The shortest sequence has too few blocks for any pattern."""
    trace = make_trace(any_rules, [53, 17, 42])
    compare(replayed(trace).head_patterns, *expected_means(trace, queries_of))


def test_of_queries_that_count(make_trace: MakeTrace, rules: Any, queries_of: Any) -> None:
    trace = make_trace(rules(heads=4, kv_heads=2), [53, 17, 42])
    rows = replayed(trace, min_context=24).head_patterns
    compare(rows, *expected_means(trace, queries_of, first=24))


def test_of_long_sequences_several_blocks_make_one(
    make_trace: MakeTrace, rules: Any, queries_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = make_trace(rules(heads=4, kv_heads=2), [53, 17, 42])
    monkeypatch.setattr(patterns, "MOST_BLOCKS", 9)
    rows = replayed(trace, 2).head_patterns
    means: dict[int, list[np.ndarray]] = defaultdict(list)
    for length, size in ((53, 6), (17, 2), (42, 6)):  # of 27, 9 and 21 blocks
        for (sequence, head), (pairs, count) in masses_of(trace, queries_of, size=size).items():
            found = by_definition(pairs, count)
            if trace.length(sequence) == length and found is not None:
                means[head].append(np.array(found))
    compare(
        rows,
        {head: np.mean(found, axis=0) for head, found in means.items()},
        {head: len(found) for head, found in means.items()},
    )


def test_heads_are_what_they_were_made_to_be(make_trace: MakeTrace, rules: Any) -> None:
    """A head that attends the near past, one with columns, one that looks so far back, and one
    whose blocks each attend some others."""
    length, size = 384, 8
    rng = np.random.default_rng(0)
    blocks = np.arange(length) // size
    queries, keys = 0.1 * rng.normal(size=(2, 4, length, 64))
    speeds = rng.uniform(0.01, 0.3, size=32)
    angles = np.arange(length)[:, None] * speeds
    turning = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    back = angles - 40 * speeds
    keys[0] += turning
    queries[0] += 0.4 * turning
    keys[1, blocks == 2] += 1.0
    keys[1, blocks == 4] += 1.0
    queries[1] += 0.1
    keys[2] += turning
    queries[2] += 0.4 * np.concatenate([np.cos(back), np.sin(back)], axis=-1)
    topics = rng.normal(size=(length // size, 64))
    keys[3] += topics[blocks]
    for block in range(2, length // size):
        own = blocks == block
        queries[3, own] += 0.3 * topics[rng.integers(1, block)]
    layer = rules(heads=4, kv_heads=4, key_dim=64, scale=1.0)
    tensors = {(0, 0): (queries, keys, rng.normal(size=(4, length, 8)))}
    trace = make_trace(layer, [length], tensors=tensors, name="kinds")
    rows = replayed(trace, size).head_patterns
    best = rows[rows["best"]].set_index("head")["pattern"]
    assert best.tolist() == ["local", "vertical", "slash", "block"]
    held = rows.pivot(index="head", columns="pattern", values="mean")
    for pattern in ("local", "vertical", "slash"):
        assert (held["given"] <= held[pattern]).all()
        assert (held[pattern] <= held["block"] + 1e-12).all()
    assert (held["local"] <= held["slash"] + 1e-12).all()


@pytest.mark.parametrize(
    ("held", "kind"),
    [
        ([0.5, 0.59, 0.58, 0.594, 0.60], "local"),
        ([0.5, 0.58, 0.52, 0.595, 0.60], "slash"),
        ([0.5, 0.591, 0.592, 0.593, 0.60], "vertical"),
        ([0.5, 0.58, 0.57, 0.589, 0.60], "block"),
        ([0.5, 0.5, 0.5, 0.5, 0.5], "local"),
    ],
)
def test_which_is_best(held: list[float], kind: str) -> None:
    assert patterns.KINDS[int(kinds(np.array(held)[:, None])[0])] == kind
    assert best_by_definition(np.array(held)) == kind


def test_other_protocols_have_none(make_trace: MakeTrace, rules: Any) -> None:
    results = analyze(make_trace(rules()), ["quest"], [2], keep_exact=False)
    assert results.head_patterns.empty


def test_the_same_bytes_however_it_is_shared_out(
    make_trace: MakeTrace, rules: Any, tmp_path: Path
) -> None:
    layer = rules(heads=4, kv_heads=2)
    trace = make_trace([layer, layer], [53, 17, 42])
    whole = replayed(trace, out=tmp_path / "one", workers=1)
    replayed(trace, out=tmp_path / "two", workers=2)
    for part in ((1, 2), (2, 2)):
        replayed(trace, out=tmp_path / "parts", part=part, workers=1)
    merge([tmp_path / "parts"])
    file = "head_patterns.parquet"
    tables = [(tmp_path / name / file).read_bytes() for name in ("one", "two", "parts")]
    assert len(set(tables)) == 1
    loaded = Results.load(tmp_path / "one")
    pd.testing.assert_frame_equal(loaded.head_patterns, whole.head_patterns)
    assert len(whole.head_patterns) == 2 * 4 * len(PATTERNS)


def test_they_stay_when_methods_come_and_go(
    make_trace: MakeTrace, rules: Any, tmp_path: Path
) -> None:
    trace = make_trace(rules(heads=4, kv_heads=2), [53])
    first = replayed(trace, out=tmp_path / "r")
    both = analyze(
        trace,
        ["a-shape:block=4"],
        [16],
        protocol=f"prefill:{SIZE}",
        keep_exact=False,
        out=tmp_path / "r",
    )
    pd.testing.assert_frame_equal(both.head_patterns, first.head_patterns)
    fewer = both.without(["a-shape:block=4"])
    pd.testing.assert_frame_equal(fewer.head_patterns, first.head_patterns)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("mean", 1.1),
        ("mean", np.nan),
        ("mean", -0.1),
        ("pattern", "x"),
        ("best", 0.5),
        ("best", True),
    ],
)
def test_a_table_that_cannot_be(make_trace: MakeTrace, rules: Any, column: str, value: Any) -> None:
    table = replayed(make_trace(rules(heads=4, kv_heads=2), [53])).head_patterns
    checked_table(table, "head_patterns.parquet")
    with pytest.raises(ValueError, match=r"head_patterns\.parquet holds"):
        checked_table(table.assign(**{column: value}), "head_patterns.parquet")


def test_kept_parts_that_cannot_be() -> None:
    right = np.stack([np.ones((5, 3)), np.full((5, 3), 0.5), np.zeros((5, 3))])
    assert (checked_patterns(right, 3).mean == 0.5).all()
    for wrong in (right[:, :4], right.astype(np.float32), right * 3, -right, right * np.nan):
        with pytest.raises(ValueError, match="patterns of heads"):
            checked_patterns(wrong, 3)
