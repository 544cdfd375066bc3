"""The k largest scores of each row, row by row."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrace.analyze.compiled import compiled

GROUPS_PER_RANK = 4
"""Groups of keys for each rank: the more there are, the closer the bound that they give."""
LEAST_GROUPS = 64
SLACK = 8
"""The search for a bound ends early where one candidate too many for this many ranks is left."""
Floats = NDArray[np.float32]
Codes = NDArray[np.int32]
Ids = NDArray[np.int64]


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores (rows, keys) float32, descending, ties to the lower key:
    scores (rows, k) and key ids (rows, k) int64; -inf and -1 where fewer are finite.

    A row is read twice: for the maxima of disjoint groups of its keys, the k-th largest of which
    k scores reach, and for the few scores that do reach it. Only those are sorted.
    """
    best = rows.new_empty((len(rows), k))
    ids = torch.empty((len(rows), k), dtype=torch.int64)
    _largest(rows.contiguous().numpy(), best.numpy(), ids.numpy())
    return best, ids


@compiled
def _largest(rows: Floats, best: Floats, ids: Ids) -> None:
    count, keys = rows.shape
    k = ids.shape[1]
    maxima = np.empty(max(LEAST_GROUPS, GROUPS_PER_RANK * k), np.int32)
    reaching = np.empty(keys + 1, np.int32)
    candidates = np.empty(keys, np.int64)
    spare = np.empty(keys, np.int64)
    tally = np.empty(256, np.int64)
    for r in range(count):
        row = rows[r]
        bound = _bound(row, k, maxima)
        found = 0
        for key in range(keys):
            reaching[found] = key
            found += row[key] >= bound
        top = np.int64(-(1 << 31))
        for i in range(found):
            top = max(top, np.int64(_code(row[reaching[i]])))
        for i in range(found):
            key = reaching[i]
            candidates[i] = ((top - np.int64(_code(row[key]))) << 32) | np.int64(key)
        ordered = _sort(candidates[:found], spare[:found], tally)
        listed = min(found, k)
        for i in range(listed):
            key = ordered[i] & 0xFFFFFFFF
            ids[r, i] = key
            best[r, i] = row[key]
        ids[r, listed:] = -1
        best[r, listed:] = -np.inf


@compiled
def _code(score: np.float32) -> np.int32:
    """An integer that orders as the score does, and one for both zeros."""
    bits = np.float32(score + np.float32(0)).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled
def _bound(row: Floats, k: int, maxima: Codes) -> np.float32:
    """A finite number that k scores reach, or all that are finite do."""
    maxima[:] = np.int32(-(1 << 31))
    bits = row.view(np.int32)
    # A group's members are far apart, since neighbouring keys often score alike.
    for start in range(0, len(row), len(maxima)):
        stride = bits[start : start + len(maxima)]
        for g in range(len(stride)):
            code = np.int32(stride[g] ^ ((stride[g] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
            maxima[g] = max(maxima[g], code)
    # At least k maxima reach `low`, or no finite number is lower; fewer reach `high`.
    low, high = np.int64(-0x7F800000), np.int64(0x7FFFFFFF)
    while high - low > 1:
        middle = (low + high) >> 1
        least = np.int32(middle)
        reached = np.int32(0)
        for g in range(len(maxima)):
            reached += np.int32(maxima[g] >= least)
        if reached < k:
            high = middle
        else:
            low = middle
            if reached <= k + k // SLACK:
                break
    return np.int32(low ^ ((low >> 31) & 0x7FFFFFFF)).view(np.float32)


@compiled
def _sort(candidates: Ids, spare: Ids, tally: Ids) -> Ids:
    """The candidates ascending by their upper 32 bits, ties as they stand, in either array."""
    bits = np.int64(0)
    for candidate in candidates:
        bits |= candidate
    shift = 32
    while shift < 64 and bits >> shift:
        tally[:] = 0
        for candidate in candidates:
            tally[(candidate >> shift) & 0xFF] += 1
        place = 0
        for digit in range(len(tally)):
            place, tally[digit] = place + tally[digit], place
        for candidate in candidates:
            digit = (candidate >> shift) & 0xFF
            spare[tally[digit]] = candidate
            tally[digit] += 1
        candidates, spare = spare, candidates
        shift += 8
    return candidates
