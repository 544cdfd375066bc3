"""What three methods of prefill choose, from their published formulas: plain loops in float64 that
share no code with retrace.

Each function takes one head's queries (positions, channels), scaled as the layer scales them, and
its keys (positions, channels), and gives a `Choice` for each block of so many consecutive queries.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

ROUNDING = 2e-5
"""How far, as a share of it, a sum of attention can be off where scores are rounded to float32."""


class Choice(NamedTuple):
    """What a block of queries attends: units of keys by their numbers."""

    chosen: set[int]
    """By float64, equals in the order of their numbers."""
    sure: set[int]
    """Those of them that every rounding within `ROUNDING` leaves in."""
    possible: set[int]
    """Those that some rounding brings in, and all of `chosen`."""


def xattention(
    queries: Array, keys: Array, rows: int, *, block: int, stride: int, part: float = 0.9
) -> list[Choice]:
    """arXiv:2503.16428, section 2: of each run of `stride` queries and each of keys, the mean
    product over the antidiagonal; a softmax over the runs so far, summed over blocks; the fewest
    blocks that reach a part of it, among them the first and the block's own."""
    found = []
    length = len(keys)
    asked, held = _runs(queries, stride)[:, ::-1], _runs(keys, stride)
    for first in range(0, length, rows):
        last = min(first + rows, length)
        shares = [0.0] * -(-last // block)
        for i in range(first // stride, -(-last // stride)):
            products = [float((asked[i] * held[j]).sum()) / stride for j in range(i + 1)]
            for j, share in enumerate(softmax(np.array(products))):
                shares[j * stride // block] += float(share)
        forced = {0, *range(first // block, len(shares))}
        found.append(_reaching(shares, forced, part))
    return found


def vertical_slash(
    queries: Array, keys: Array, rows: int, *, k: int, columns: float, last: int
) -> list[Choice]:
    """arXiv:2407.02490, section 3: the columns and diagonals that the prompt's last queries attend
    most, the first 30 and the first 100 before all others. A share of k keys are columns, and as
    many diagonals follow as the other keys have room for, each as wide as a block of queries."""
    length = len(keys)
    by_column, by_distance = _lines(queries, keys, last)
    by_column[:30], by_distance[:100] = np.inf, np.inf
    count = round(columns * k)
    best = _best(by_column.tolist(), count, count, count)
    distances = by_distance.tolist()
    found = []
    for first in range(0, length, rows):
        end = min(first + rows, length)
        if k >= end:
            every = set(range(end))
            found.append(Choice(every, every, every))
            continue
        own = set(range(first, end))
        lines = _diagonals(distances, first, end, k - count)
        found.append(
            Choice(
                *(
                    own | {j for j in some if j < end} | keys_on
                    for some, keys_on in zip(best, lines, strict=True)
                )
            )
        )
    return found


def flexprefill(
    queries: Array,
    keys: Array,
    rows: int,
    *,
    block: int,
    tau: float = 0.1,
    least: int = 512,
    part: float = 0.9,
) -> list[Choice]:
    """arXiv:2502.20766, section 3: columns and diagonals of blocks by the prompt's last block of
    queries; where mean keys show its mass by block, within `tau`, also the blocks of pooled
    attention that come to a part of all."""
    length = len(keys)
    count, fewest = -(-length // block), min(-(-least // block), -(-length // block))
    by_column, by_distance = _lines(queries, keys, block)
    by_column, by_distance = by_column / block, by_distance / block
    mean_keys = np.array([keys[j : j + block].mean(axis=0) for j in range(0, length, block)])
    estimate = softmax(mean_keys @ queries[-block:].mean(axis=0))
    apart = _divergence(estimate, np.array(_pooled(by_column, block)))
    if count <= max(2, -(-least // block)):
        whole = [set(range(-(-min(i + rows, length) // block))) for i in range(0, length, rows)]
        return [Choice(every, every, every) for every in whole]
    lines, pools = (
        [
            _best(
                [math.inf, *_pooled(of, block)[1:]],
                *(
                    fewest if aware else _covering(of, share, block, fewest, count)
                    for share in (part, part - ROUNDING, part + ROUNDING)
                ),
            )
            for of in (by_column, by_distance)
        ]
        for aware in (False, True)
    )
    attended = _pooled_attention(queries, mean_keys, block, part)
    found = []
    for first in range(0, length, rows):
        end = min(first + rows, length)
        mine = range(first // block, -(-end // block))
        kinds = []
        for aware, (columns, diagonals) in ((False, lines), (True, pools)):
            sets = []
            for which in range(3):
                units = set(mine)
                for i in mine:
                    units |= {
                        j
                        for j in range(i + 1)
                        if j in columns[which]
                        or i - j in diagonals[which]
                        or (aware and (i, j) in attended[which])
                    }
                sets.append(units)
            kinds.append(Choice(*sets))
        chosen = kinds[apart < tau]
        if abs(apart - tau) <= ROUNDING:
            found.append(
                Choice(
                    chosen.chosen,
                    kinds[0].sure & kinds[1].sure,
                    kinds[0].possible | kinds[1].possible,
                )
            )
        else:
            found.append(chosen)
    return found


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    weights: Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _runs(vectors: Array, stride: int) -> Array:
    """Runs of so many vectors (runs, stride, channels), the last filled up with zeros."""
    count = -(-len(vectors) // stride)
    found = np.zeros((count, stride, vectors.shape[1]))
    for i, vector in enumerate(vectors):
        found[i // stride, i % stride] = vector
    return found


def _lines(queries: Array, keys: Array, last: int) -> tuple[Array, Array]:
    """What the last queries attend by column, and by how far back it is."""
    length = len(keys)
    columns, diagonals = np.zeros(length), np.zeros(length)
    for i in range(max(0, length - last), length):
        for j, share in enumerate(softmax(keys[: i + 1] @ queries[i])):
            columns[j] += share
            diagonals[i - j] += share
    return columns, diagonals


def _in_order(values: Sequence[float]) -> list[int]:
    """Numbers of the values, the largest first, equals in the order of their numbers."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def _bounds(ordered: Sequence[float], place: int) -> tuple[int, int]:
    """How many of some descending values are before one of them whatever the rounding, and how many
    may be, itself among them."""
    own = ordered[place]
    if math.isinf(own):  # forced, in the order of their numbers
        return place, place + 1
    before, until = place, place + 1
    while before > 0 and ordered[before - 1] <= own * (1 + ROUNDING):
        before -= 1
    while until < len(ordered) and ordered[until] >= own * (1 - ROUNDING):
        until += 1
    return before, until


def _reaching(shares: list[float], forced: set[int], part: float) -> Choice:
    """The forced ones, and of the others the fewest that bring all to a part."""
    total = sum(shares)
    others = [i for i in _in_order(shares) if i not in forced]
    ordered = [shares[i] for i in others]
    held = [sum(shares[i] for i in forced)]
    for share in ordered:
        held.append(held[-1] + share)
    found = Choice(set(forced), set(forced), set(forced))
    for place, j in enumerate(others):
        before, until = _bounds(ordered, place)
        if held[place] < part * total:
            found.chosen.add(j)
        if held[until] - ordered[place] < (part - ROUNDING) * total:
            found.sure.add(j)
        if held[before] < (part + ROUNDING) * total:
            found.possible.add(j)
    return found


def _best(values: Sequence[float], count: int, least: int, most: int) -> Choice:
    """The so many best; of roundings that also move their number, from the least to the most."""
    order = _in_order(values)
    ordered = [values[i] for i in order]
    found = Choice(set(order[:count]), set(), set())
    for place, j in enumerate(order):
        before, until = _bounds(ordered, place)
        if until <= least:
            found.sure.add(j)
        if before < most:
            found.possible.add(j)
    return found


def _window(first: int, end: int, far: int) -> range:
    """The keys so far back from any query of a block."""
    return range(max(0, first - far), max(0, end - far))


def _diagonals(values: Sequence[float], first: int, end: int, room: int) -> Choice:
    """The keys on the best diagonals through a block of queries: of all that there is room for
    before the first that there is none for."""
    order = [far for far in _in_order(values) if far < end]
    ordered = [values[far] for far in order]
    reached: dict[int, int] = {}  # a key, and which diagonal comes to it first
    held = [0]
    for place, far in enumerate(order):
        for key in _window(first, end, far):
            reached.setdefault(key, place)
        held.append(len(reached))
    found = Choice(set(), set(), set())
    for place, far in enumerate(order):
        if held[place] > room and not held[_bounds(ordered, place)[0]] <= room:
            break
        before, until = _bounds(ordered, place)
        window = set(_window(first, end, far))
        if held[place + 1] <= room:
            found.chosen.update(window)
        if held[until] <= room:
            found.sure.update(window)
        if held[before] + sum(reached[key] >= before for key in window) <= room:
            found.possible.update(window)
    return found


def _pooled(values: Array, block: int) -> list[float]:
    """Sums over blocks."""
    return [float(values[j : j + block].sum()) for j in range(0, len(values), block)]


def _covering(values: Array, part: float, block: int, fewest: int, count: int) -> int:
    """How many blocks have as many places as it takes to come to more than a part."""
    held, places = 0.0, 0
    for share in sorted(values.tolist(), reverse=True):
        held += share
        if held > part:
            break
        places += 1
    return min(max((places + 1) // block + 1, fewest), count)


def _pooled_attention(
    queries: Array, mean_keys: Array, block: int, part: float
) -> tuple[set[tuple[int, int]], ...]:
    """The pairs of blocks of largest pooled attention that come to no more than a part of all:
    chosen, sure and possible."""
    shares: list[float] = []
    pairs = []
    for i in range(len(mean_keys)):
        asked = queries[i * block : (i + 1) * block].mean(axis=0)
        for j, share in enumerate(softmax(mean_keys[: i + 1] @ asked)):
            shares.append(float(share))
            pairs.append((i, j))
    total = part * len(mean_keys)
    order = _in_order(shares)
    ordered = [shares[i] for i in order]
    held = [0.0]
    for share in ordered:
        held.append(held[-1] + share)
    chosen, sure, possible = (set[tuple[int, int]]() for _ in range(3))
    for place, own in enumerate(order):
        before, until = _bounds(ordered, place)
        if held[place + 1] <= total:
            chosen.add(pairs[own])
        if held[until] <= total * (1 - ROUNDING):
            sure.add(pairs[own])
        if held[before] + shares[own] <= total * (1 + ROUNDING):
            possible.add(pairs[own])
    return chosen, sure, possible


def _divergence(one: Array, other: Array) -> float:
    """Square root of the Jensen-Shannon divergence."""
    apart = 0.0
    for p, q in zip(one.tolist(), other.tolist(), strict=True):
        for share in (p, q):
            if share > 0:
                apart += share * math.log(2 * share / (p + q)) / 2
    return math.sqrt(max(0.0, apart))
