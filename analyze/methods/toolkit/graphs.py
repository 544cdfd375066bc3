"""Graphs of keys: linked by what queries have in common and by inner product, searched greedily.

A graph is the links of each key (keys, links) int32, -1 where there are fewer.

Rows are filled and compared number by number, and every key is an int64: slices set to slices, and
a second type, would take ten seconds more to compile.
"""

import numpy as np
from numpy.typing import NDArray

from retrace.analyze.compiled import compiled, compiled_sums

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]
Flags = NDArray[np.bool_]


@compiled
def project(keys: Floats, nearest: Ids, links: Ids) -> None:
    """Link the nearest key of each query to its other near ones (queries, near), best first, -1
    where there are fewer, and those back to it."""
    chosen = np.empty(links.shape[1], np.int32)
    for q in range(len(nearest)):
        target = np.int64(nearest[q, 0])
        if target >= 0:
            _relink(keys, links, target, nearest[q, 1:], chosen)


@compiled
def connect(keys: Floats, links: Ids, first: int, entry: int, width: int, own: Ids) -> None:
    """Link every key from `first` on to those that a search for it finds, and those back to it:
    `own` are the columns of `links` that this may fill."""
    ids, scores = np.empty(width, np.int32), np.empty(width, np.float32)
    expanded, seen = np.empty(width, np.bool_), np.full(len(keys), -1, np.int32)
    chosen = np.empty(own.shape[1], np.int32)
    for key in range(first, len(keys)):
        if key != entry:
            found = beam(keys, links, entry, keys[key], ids, scores, expanded, seen, key)[0]
            _relink(keys, own, key, ids[:found], chosen)


@compiled
def search(
    keys: Floats, links: Ids, entry: int, queries: Floats, ids: Ids, scores: Floats, cost: Ids
) -> None:
    """The keys that a search for each query meets, best first, in `ids` and `scores`
    (queries, width), and in `cost` (queries, 2) how many keys were compared and expanded."""
    expanded, seen = np.empty(ids.shape[1], np.bool_), np.full(len(keys), -1, np.int32)
    for q in range(len(queries)):
        found, compared, hops = beam(
            keys, links, entry, queries[q], ids[q], scores[q], expanded, seen, q
        )
        for i in range(found, ids.shape[1]):
            ids[q, i], scores[q, i] = -1, -np.inf
        cost[q, 0] = compared
        cost[q, 1] = hops


@compiled
def beam(
    keys: Floats,
    links: Ids,
    entry: int,
    query: Floats,
    ids: Ids,
    scores: Floats,
    expanded: Flags,
    seen: Ids,
    mark: int,
) -> tuple[int, int, int]:
    """Best-first search by inner product from one key: how many keys it holds at its end, best
    first, in `ids` and `scores` (width,), how many it compared, and how many it expanded. `seen`
    (keys,) becomes `mark` where a key was compared."""
    ids[0], scores[0], expanded[0] = entry, dot(keys[entry], query), False
    seen[entry] = mark
    found, compared, hops, place = 1, 1, 0, 0
    while place < found:
        if expanded[place]:
            place += 1
            continue
        expanded[place] = True
        hops += 1
        following = place + 1
        row = links[ids[place]]
        for i in range(len(row)):
            other = row[i]
            if other < 0 or seen[other] == mark:
                continue
            seen[other] = mark
            compared += 1
            score = dot(keys[other], query)
            if found == len(ids) and score <= scores[found - 1]:
                continue
            found = min(found + 1, len(ids))
            at = found - 1
            while at > 0 and scores[at - 1] < score:
                ids[at], scores[at], expanded[at] = ids[at - 1], scores[at - 1], expanded[at - 1]
                at -= 1
            ids[at], scores[at], expanded[at] = other, score, False
            following = min(following, at)
        place = following
    return found, compared, hops


@compiled_sums
def dot(one: Floats, other: Floats) -> np.float32:
    """The inner product of two vectors (channels,), summed in float32."""
    total = np.float32(0)
    for c in range(len(one)):
        total += one[c] * other[c]
    return total


@compiled
def _relink(keys: Floats, links: Ids, key: int, others: Ids, chosen: Ids) -> None:
    """Choose a key's links among those that it has and others, and link those back to it."""
    row = links[key]
    _choose(keys, row, key, others, chosen)
    back = np.empty(1, np.int32)
    back[0] = key
    for i in range(len(row)):
        if row[i] >= 0:
            _choose(keys, links[row[i]], np.int64(row[i]), back, chosen)


@compiled
def _choose(keys: Floats, row: Ids, key: int, others: Ids, chosen: Ids) -> None:
    """Set a key's row of links to the nearest of those that it has and others, none of them nearer
    to a chosen one than to the key; where that leaves room, to the nearest of the rest. `chosen`
    (links,) is overwritten."""
    candidates = np.empty(len(row) + len(others), np.int32)
    held = 0
    for i in range(len(row)):
        if row[i] >= 0:
            candidates[held] = row[i]
            held += 1
    count = held
    for i in range(len(others)):
        if others[i] >= 0 and others[i] != key and not _holds(candidates, held, others[i]):
            candidates[count] = others[i]
            count += 1
    if count == held or count <= len(row):
        for i in range(len(row)):
            row[i] = candidates[i] if i < count else -1
        return
    # The nearest first, ties as they stand.
    products = np.empty(count, np.float32)
    for i in range(count):
        candidate, product = candidates[i], dot(keys[candidates[i]], keys[key])
        at = i
        while at > 0 and products[at - 1] < product:
            candidates[at], products[at] = candidates[at - 1], products[at - 1]
            at -= 1
        candidates[at], products[at] = candidate, product
    taken, size = np.zeros(count, np.bool_), 0
    for i in range(count):
        hidden = False
        for j in range(size):
            if dot(keys[candidates[i]], keys[chosen[j]]) > products[i]:
                hidden = True
                break
        if not hidden and size < len(row):
            chosen[size] = candidates[i]
            taken[i] = True
            size += 1
    for i in range(count):
        if size < len(row) and not taken[i]:
            chosen[size] = candidates[i]
            size += 1
    for i in range(len(row)):
        row[i] = chosen[i]


@compiled
def _holds(candidates: Ids, count: int, wanted: int) -> bool:
    """Whether a key is among the first candidates."""
    for i in range(count):
        if candidates[i] == wanted:
            return True
    return False
