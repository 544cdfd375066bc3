"""Counts of how keys move from query to query, against a buffer that is simulated key by key."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from retrace.analyze.metrics import locality
from retrace.analyze.metrics.locality import SIZES, SPANS, Locality, misses
from retrace.analyze.metrics.recency import RecentKeys
from retrace.analyze.units.selection import Selection
from retrace.analyze.units.unit import Block, HeadGroup, Unit
from retrace.traces import LayerRules


def a_unit(group: int, length: int, positions: Sequence[int]) -> Unit:
    """Zeros of 4 channels of keys and 2 of values."""
    rules = LayerRules("zeros", group, 1, 4, 2, 1.0)
    queries, keys = torch.zeros(group, len(positions), 4), torch.zeros(length, 4)
    values = torch.zeros(length, 2)
    return Unit(HeadGroup(0, 0, 0, rules), queries, torch.tensor(positions), keys, values, None)


def simulated(lists: Sequence[set[int]], positions: Sequence[int], each: float) -> dict[str, Any]:
    """What a cache comes to, by the definitions alone: a dictionary in order of touches for each
    size, and sets of keys."""
    buffers: dict[int, OrderedDict[int, None]] = {size: OrderedDict() for size in SIZES}
    kinds = dict.fromkeys(("queries", "attended", "written", "first", "repeated", "returned"), 0)
    missed = dict.fromkeys(SIZES, 0)
    for now, (keys, position) in enumerate(zip(lists, positions, strict=True)):
        earlier = set().union(*lists[:now])
        if now:
            kinds["queries"] += 1
            kinds["attended"] += len(keys)
            kinds["written"] += position in keys
            kinds["repeated"] += len(keys & lists[now - 1])
            kinds["returned"] += len((keys & earlier) - lists[now - 1])
            kinds["first"] += len(keys - earlier - {position})
        for size, buffer in buffers.items():
            if now:
                missed[size] += len(keys - buffer.keys() - {position})
            for key in sorted(keys | {position}):
                buffer.pop(key, None)
                buffer[key] = None
                if len(buffer) > size:
                    buffer.popitem(last=False)
    windows = {
        span: [set().union(*lists[i : i + span]) for i in range(len(lists) - span + 1)]
        for span in SPANS
    }
    return {
        **kinds,
        "misses": list(missed.values()),
        "missed_bytes": [each * count for count in missed.values()],
        "working": [sum(map(len, of_span)) for of_span in windows.values()],
        "windows": [len(of_span) for of_span in windows.values()],
    }


def counted(found: Locality, budget: int, cache: int) -> dict[str, Any]:
    """The same of what the walk counted."""
    counts = found.counts[budget, 0, cache]
    names = ("queries", "attended", "written", "first", "repeated", "returned")
    return {
        **{name: counts[getattr(locality, name.upper())] for name in names},
        "misses": misses(counts).tolist(),
        "missed_bytes": found.missed_bytes[budget, 0, cache].tolist(),
        "working": counts[locality.WORKING].tolist(),
        "windows": counts[locality.WINDOWS].tolist(),
    }


def drifting(
    group: int, positions: Sequence[int], listed: int, rng: np.random.Generator
) -> torch.Tensor:
    """Ranked lists (group, queries, listed) of keys up to each query's own, of which many come
    again; -1 behind."""
    ids = np.full((group, len(positions), listed), -1)
    for head in range(group):
        liked = rng.random(positions[-1] + 1) ** 3
        for row, position in enumerate(positions):
            weight = liked[: position + 1] * rng.random(position + 1)
            weight[-3:] += rng.random(3)[-len(weight) :] * (rng.random() < 0.5)
            count = min(position + 1, listed - int(rng.integers(0, 3)))
            ids[head, row, :count] = (-weight).argsort()[:count]
    return torch.from_numpy(ids)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("rows", [1, 7, 400])
def test_as_simulated(group: int, rows: int) -> None:
    """Block by block, over more queries than the longest span and many that close ranks."""
    positions, rng = range(20, 420), np.random.default_rng(rows)
    unit = a_unit(group, 420, positions)
    ids, ks, points, first = drifting(group, positions, 24, rng), (1, 5, 24), [1, 2], [20, 20, 31]
    attended = torch.tensor(ks)[:, None, None] + torch.from_numpy(rng.integers(0, 2, (3, 1, 400)))
    walk = RecentKeys(unit, [5, 24])
    for start in range(0, 400, rows):
        block = Block(unit, slice(start, min(start + rows, 400)))
        selection = Selection(
            ks,
            ids[:, block.rows],
            attended[..., block.rows],
            attended_bytes=0.5 if start < 200 else None,
        )
        walk.add(block, selection, points, first)
    for budget, point in enumerate(points):
        begin = first[point] - 20
        heads = [
            [set(ids[h, r, : attended[point, 0, r]].tolist()) - {-1} for r in range(begin, 400)]
            for h in range(group)
        ]
        together = [[set().union(*each) for each in zip(*heads, strict=True)]] if group > 1 else []
        for cache, lists in enumerate(heads + together):
            wanted = simulated(lists, positions[begin:], 0.5)
            found = counted(walk.found, budget, cache)
            if rows == 400:
                assert found == wanted
                assert 0 < found["repeated"] < found["attended"] and found["returned"]
                assert len(set(found["misses"])) > 6
            del wanted["missed_bytes"]  # two prices: another test's
            assert {name: found[name] for name in wanted} == wanted


def test_kept_counts_that_cannot_be_are_refused() -> None:
    unit = a_unit(2, 40, range(40))
    walk = RecentKeys(unit, [3])
    ids = drifting(2, range(40), 6, np.random.default_rng(0))
    walk.add(Block(unit, slice(0, 40)), Selection((3,), ids, torch.full((1, 1, 1), 3)), [0], [0])
    found, nothing = walk.found, Locality.empty(1, 1, 2)
    arrays = {"counts": found.counts, "missed_bytes": found.missed_bytes}
    assert (Locality.checked(nothing, **arrays).counts == found.counts).all()
    for name, place, number in (
        ("counts", locality.REPEATED, 1),
        ("counts", locality.DISTANCES.start, 10**6),
        ("counts", locality.WORKING.start, -(10**6)),
        ("missed_bytes", 0, np.nan),
        ("missed_bytes", 0, -1e9),
    ):
        wrong = {**arrays, name: arrays[name].copy()}
        wrong[name][0, 0, 0, place] += number
        with pytest.raises(ValueError, match="cannot be"):
            Locality.checked(nothing, **wrong)
    with pytest.raises(ValueError, match="no counts"):
        Locality.checked(nothing, found.counts[:, :, :2], found.missed_bytes)
    with pytest.raises(ValueError, match="no counts"):
        Locality.checked(nothing, found.counts.astype(float), found.missed_bytes)
