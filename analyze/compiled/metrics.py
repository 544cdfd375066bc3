"""All metrics of a selection, list by list, straight into moments over queries."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrace.analyze.compiled.loops import compiled, compiled_sums

Bools = NDArray[np.bool_]
Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Ints = NDArray[np.int32]

AT_ALL = ("recall", "attention_fraction", "exact_attention_fraction", "candidate_recall")
AT_POINTS = ("error_norm", "density", "bytes_ratio")
RECALL, FRACTION, EXACT_FRACTION, CANDIDATE_RECALL = range(4)
ERROR_NORM, DENSITY, BYTES_RATIO = range(3)
COUNT, MEAN, SQUARES = range(3)


def moments(
    *,
    ks: Tensor,
    points: Tensor,
    counted: tuple[Tensor, Tensor],
    visible: Tensor,
    lists: tuple[Tensor, Tensor],
    attended: Tensor,
    besides: Tensor,
    given: tuple[int, Tensor],
    exact: tuple[Tensor, Tensor, Tensor],
    values: Tensor,
    mass: tuple[bool, Tensor],
    filled: tuple[Tensor, Tensor] | None,
    errors: Tensor | None,
    read: tuple[float, float, Tensor],
) -> tuple[Doubles, Doubles]:
    """Counts, means and sums of squared deviations over queries: (group, `AT_ALL`, 3, budgets) and
    (group, `AT_POINTS`, 3, points).

    Args:
        ks: budgets (budgets,), ascending.
        points: which of them have an error norm and a cost (points,).
        counted: how many budgets, and how many points, each query (queries,) counts for: the first.
        visible: keys that each query sees (queries,).
        lists: keys (group, queries, listed), -1 only at the end, and the exact probability of each,
            float64.
        attended: keys of the list that each budget reaches (budgets, group or 1, queries or 1).
        besides: how many of them come besides the budget (queries or 1,).
        given: keys before this position, and from those (budgets or 1, queries) on, did not have
            to be found.
        exact: the best keys (group, queries, ranks), attention mass on the first 0, 1, ... of them
            float64, and the output (group, queries, value channels) float32.
        values: (keys, value channels) float32.
        mass: whether outputs are divided by what is attended, and the mass in the denominator
            besides (group, queries) float64.
        filled: share of the output that attended keys have (points, group, queries) float64, and
            what has the rest (queries, value channels), where anything has.
        errors: error norms (points, group, queries), where the method gave the output itself.
        read: bytes of an attended key and value, of one that is read in full, and bytes read to
            find them (queries,).
    """
    ids, probabilities = lists
    best, masses, output = exact
    group, queries, _ = ids.shape
    # The first budget that a key of each rank counts for.
    first_budgets = torch.searchsorted(ks, torch.arange(best.shape[2] + 1), right=True)
    at_all = np.zeros((group, len(AT_ALL), 3, len(ks)))
    at_points = np.zeros((group, len(AT_POINTS), 3, len(points)))
    share, fill = filled or (torch.ones(0, 1, 1, dtype=torch.float64), torch.zeros(0, 1))
    _moments(
        _plain(ks),
        _plain(points),
        _plain(counted[0]),
        _plain(counted[1]),
        _plain(visible),
        _plain(ids),
        _plain(probabilities),
        _plain(first_budgets),
        _plain(attended.movedim(0, -1)),
        _plain(besides),
        given[0],
        _plain(given[1].T),
        _plain(best),
        _plain(masses),
        _plain(output),
        _plain(values),
        mass[0],
        _plain(mass[1]),
        _plain(share),
        _plain(fill),
        _plain(torch.zeros(0, 1, 1) if errors is None else errors),
        read[0],
        read[1],
        _plain(read[2].double().expand(queries)),
        at_all,
        at_points,
    )
    return at_all, at_points


def _plain(tensor: Tensor) -> NDArray[np.generic]:
    array: NDArray[np.generic] = tensor.contiguous().numpy()
    return array


@compiled
def _moments(
    ks: Ids,
    points: Ids,
    counted_budgets: Ids,
    counted_points: Ids,
    visible: Ids,
    ids: Ids,
    probabilities: Doubles,
    first_budgets: Ids,
    attended: Ids,
    besides: Ids,
    sink: int,
    first_given: Ids,
    best: Ids,
    masses: Doubles,
    output: Floats,
    values: Floats,
    renormalised: bool,
    mass_besides: Doubles,
    share: Doubles,
    fill: Floats,
    errors: Floats,
    bytes_each: float,
    bytes_full: float,
    bytes_aux: Doubles,
    at_all: Doubles,
    at_points: Doubles,
) -> None:
    """`moments`, with every argument an array of its own."""
    group, queries = ids.shape[:2]
    at_heads, at_queries, budgets = attended.shape
    reached = np.empty((group, budgets), np.int64)
    hits, wanted = np.empty(budgets, np.int64), np.empty(budgets, np.int64)
    found = np.empty((4, budgets))
    seen = np.empty((3, len(points)))
    ahead = np.full(len(values), len(points), np.int32)
    ranks = np.full(len(values), best.shape[2], np.int32)
    unions = np.empty(len(points))
    sums = np.empty(values.shape[1], np.float32)
    nothing = np.empty(0, np.int64)
    anything_given = sink > 0 or len(first_given) > 0
    for q in range(queries):
        most, reads = counted_budgets[q], counted_points[q]
        for h in range(group):
            count = _count(ids[h, q])
            for b in range(most):
                reached[h, b] = min(attended[h % at_heads, q % at_queries, b], count)
        _union(ids[:, q], reached, points[:reads], ahead, unions)
        for h in range(group):
            extra = besides[q % len(besides)]
            _rank(best[h, q], ranks)
            _recalls(
                ids[h, q], ranks, first_budgets, ks[:most], reached[h], extra, 0, nothing, hits
            )
            for b in range(most):
                found[RECALL, b] = hits[b] / min(ks[b], visible[q])
            if anything_given:
                _recalls(
                    ids[h, q], ranks, first_budgets, ks[:most], reached[h], extra,
                    sink, first_given[q] if len(first_given) else nothing, hits,
                )  # fmt: skip
                _wanted(
                    best[h, q], ks[:most], sink, first_given[q] if len(first_given) else nothing,
                    wanted,
                )  # fmt: skip
                for b in range(most):
                    # Not counted where nothing had to be found.
                    found[CANDIDATE_RECALL, b] = hits[b] / wanted[b] if wanted[b] else np.nan
                _add_numbers(at_all[h, CANDIDATE_RECALL], found[CANDIDATE_RECALL, :most])
            _unrank(best[h, q], ranks)
            _masses(probabilities[h, q], reached[h], found[FRACTION, :most])
            for b in range(most):
                found[EXACT_FRACTION, b] = masses[h, q, ks[b]]
            for metric in (RECALL, FRACTION, EXACT_FRACTION):
                _add(at_all[h, metric], found[metric, :most])
            if len(errors):
                for p in range(reads):
                    seen[ERROR_NORM, p] = errors[p, h, q]
            else:
                _error_norms(
                    ids[h, q], probabilities[h, q], values, output[h, q], reached[h],
                    points[:reads], renormalised, mass_besides[h, q],
                    share[:, h % share.shape[1], q % share.shape[2]],
                    fill[q if len(fill) else 0 :], sums, seen[ERROR_NORM],
                )  # fmt: skip
            whole = visible[q] * bytes_full
            for p in range(reads):
                seen[DENSITY, p] = reached[h, points[p]] / visible[q]
                seen[BYTES_RATIO, p] = (unions[p] * bytes_each + bytes_aux[q]) / whole
            for metric in range(3):
                _add(at_points[h, metric], seen[metric, :reads])


@compiled
def _count(ids: Ids) -> int:
    """How many keys a list holds before the -1 at its end."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if ids[middle] < 0:
            high = middle
        else:
            low = middle + 1
    return low


@compiled
def _union(ids: Ids, reached: Ids, points: Ids, ahead: Ints, unions: Doubles) -> None:
    """Distinct keys that any head attends at each point. `ahead` (keys,) holds the number of points
    that there are at most, before and after."""
    none = len(unions)
    unions[:] = 0.0
    for h in range(len(ids)):
        place = 0
        for p in range(len(points)):
            while place < reached[h, points[p]]:
                ahead[ids[h, place]] = min(ahead[ids[h, place]], p)
                place += 1
    for h in range(len(ids)):
        for place in range(reached[h, points[-1]] if len(points) else 0):
            # A key that several heads attend is counted at the first point of any of them.
            key = ids[h, place]
            if ahead[key] < none:
                unions[ahead[key]] += 1.0
                ahead[key] = none
    for p in range(1, len(points)):
        unions[p] += unions[p - 1]


@compiled
def _rank(best: Ids, ranks: Ints) -> None:
    """Write the exact rank of every key that has one."""
    for rank in range(len(best)):
        if best[rank] >= 0:
            ranks[best[rank]] = rank


@compiled
def _unrank(best: Ids, ranks: Ints) -> None:
    """Take back what `_rank` wrote."""
    for rank in range(len(best)):
        if best[rank] >= 0:
            ranks[best[rank]] = len(best)


@compiled
def _recalls(
    ids: Ids,
    ranks: Ints,
    first_budgets: Ids,
    ks: Ids,
    reached: Ids,
    besides: int,
    sink: int,
    first_given: Ids,
    hits: Ids,
) -> None:
    """How many of the listed keys that had to be found are among the k best, attended and among
    the list's k best-ranked, at every budget k."""
    budgets, place, total = len(ks), 0, 0
    hits[:budgets] = 0
    for b in range(budgets):
        # Those that this budget is the first to reach are hits from it on, or from where their
        # exact rank is within the budget.
        while place < min(reached[b], ks[b] + besides):
            key = ids[place]
            at = max(b, first_budgets[ranks[key]])
            until = _given_from(key, sink, first_given, budgets)
            if at < until:
                hits[at] += 1
                if until < budgets:
                    hits[until] -= 1
            place += 1
    for b in range(budgets):
        total += hits[b]
        hits[b] = total


@compiled
def _wanted(best: Ids, ks: Ids, sink: int, first_given: Ids, wanted: Ids) -> None:
    """How many of the k best keys had to be found, at every budget k."""
    budgets, rank, total = len(ks), 0, 0
    wanted[:budgets] = 0
    for b in range(budgets):
        while rank < min(ks[b], len(best)):
            if best[rank] >= 0:
                until = _given_from(best[rank], sink, first_given, budgets)
                if b < until:
                    wanted[b] += 1
                    if until < budgets:
                        wanted[until] -= 1
            rank += 1
    for b in range(budgets):
        total += wanted[b]
        wanted[b] = total


@compiled
def _given_from(key: int, sink: int, first_given: Ids, budgets: int) -> int:
    """The first budget at which a key did not have to be found, of those that there are."""
    if key < sink:
        return 0
    if not len(first_given) or key < first_given[-1]:
        return budgets
    if len(first_given) == 1:
        return 0
    for b in range(budgets):
        if key >= first_given[b]:
            return b
    return budgets


@compiled
def _masses(probabilities: Doubles, reached: Ids, fractions: Doubles) -> None:
    """The attention mass on what each budget reaches."""
    place, mass = 0, 0.0
    for b in range(len(fractions)):
        while place < reached[b]:
            mass += probabilities[place]
            place += 1
        fractions[b] = mass


@compiled_sums
def _error_norms(
    ids: Ids,
    probabilities: Doubles,
    values: Floats,
    output: Floats,
    reached: Ids,
    points: Ids,
    renormalised: bool,
    besides: float,
    share: Doubles,
    fill: Floats,
    sums: Floats,
    errors: Doubles,
) -> None:
    """||o - o'|| / ||o||, o' being the output over what each point reaches."""
    if not len(points):
        return
    channels = len(sums)
    sums[:] = 0.0
    norm = np.float32(0.0)
    for c in range(channels):
        norm += output[c] * output[c]
    # Sums are relative to the largest so far, since probabilities of what was selected may be tiny.
    place, total, largest = 0, 0.0, 1e-300
    for p in range(len(points)):
        stop = reached[points[p]]
        while place < stop:
            # Four at once, so that the sums are read and written less often.
            count = min(4, stop - place)
            peak = largest
            for j in range(place, place + count):
                total += probabilities[j]
                peak = max(peak, probabilities[j])
            if peak > largest:
                smaller = np.float32(largest / peak)
                for c in range(channels):
                    sums[c] *= smaller
                largest = peak
            if count == 4:
                w0 = np.float32(probabilities[place] / largest)
                w1 = np.float32(probabilities[place + 1] / largest)
                w2 = np.float32(probabilities[place + 2] / largest)
                w3 = np.float32(probabilities[place + 3] / largest)
                k0, k1, k2, k3 = ids[place], ids[place + 1], ids[place + 2], ids[place + 3]
                for c in range(channels):
                    sums[c] += (w0 * values[k0, c] + w1 * values[k1, c]) + (
                        w2 * values[k2, c] + w3 * values[k3, c]
                    )
            else:
                for j in range(place, place + count):
                    weight, key = np.float32(probabilities[j] / largest), ids[j]
                    for c in range(channels):
                        sums[c] += weight * values[key, c]
            place += count
        factor = largest
        if renormalised:
            factor = largest / (total + besides) if total + besides > 0.0 else 1.0
        error = np.float32(0.0)
        if len(share):
            part, rest = np.float32(share[p] * factor), np.float32(1.0 - share[p])
            for c in range(channels):
                error += (output[c] - part * sums[c] - rest * fill[0, c]) ** 2
        else:
            part = np.float32(factor)
            for c in range(channels):
                error += (output[c] - part * sums[c]) ** 2
        errors[p] = np.sqrt(error / norm) if error != 0.0 else 0.0


@compiled
def _add(moments: Doubles, samples: Doubles) -> None:
    """Add a sample each to the first streams (3, streams), as Welford (1962) does."""
    for i in range(len(samples)):
        moments[COUNT, i] += 1.0
        apart = samples[i] - moments[MEAN, i]
        moments[MEAN, i] += apart / moments[COUNT, i]
        moments[SQUARES, i] += apart * (samples[i] - moments[MEAN, i])


@compiled
def _add_numbers(moments: Doubles, samples: Doubles) -> None:
    """Add a sample each, where it is not NaN."""
    for i in range(len(samples)):
        if not np.isnan(samples[i]):
            _add(moments[:, i : i + 1], samples[i : i + 1])
