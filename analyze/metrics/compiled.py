"""All metrics of a selection, list by list, straight into moments over queries."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrace.analyze.compiled import compiled, compiled_sums
from retrace.analyze.metrics.registry import AT_ALL, AT_POINTS, BUCKETED, BY_NAME, TAILED
from retrace.analyze.units.compiled_scores import score

Bools = NDArray[np.bool_]
Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

RECALL = AT_ALL.index("recall")
FRACTION = AT_ALL.index("attention_fraction")
EXACT_FRACTION = AT_ALL.index("exact_attention_fraction")
ATTENDED_RECALL = AT_ALL.index("attended_recall")
CANDIDATE_RECALL = AT_ALL.index("candidate_recall")
TOP1_HIT = AT_ALL.index("top1_hit")
ERROR_NORM = AT_POINTS.index("error_norm")
DENSITY = AT_POINTS.index("density")
BYTES_RATIO = AT_POINTS.index("bytes_ratio")
EVERY_QUERYS = tuple(i for i, metric in enumerate(AT_ALL) if BY_NAME[metric].every_query)
"""Of `AT_ALL`, those that every query has."""
TOLD, KEPT = (
    tuple(
        ((AT_ALL if at_all else AT_POINTS).index(metric), at_all)
        for metric in metrics
        for at_all in (metric in AT_ALL,)
    )
    for metrics in (BUCKETED, TAILED)
)
"""Where each of `BUCKETED` and of `TAILED` is found: its place, and whether that is in `AT_ALL`."""
COUNT, MEAN, SQUARES = range(3)
ALL, ATTENDED, TO_FIND = range(3)
"""Hits of recall, of `attended_recall` and of `candidate_recall`."""
LEAST_LOG = -1e300
"""Lower than the log of any probability, and finite."""
VANISHING = -600.0
"""Probabilities with lower logs lose digits in float64, or vanish."""


class Asked(NamedTuple):
    """What is asked of a block's queries."""

    ks: Tensor
    """Budgets (budgets,), ascending."""
    points: Tensor
    """Which of them have an error norm and a cost (points,)."""
    counted_budgets: Tensor
    """How many budgets each query (queries,) counts for: the first."""
    counted_points: Tensor
    """How many points."""
    buckets: Tensor
    """The bucket that each query is in on each axis (axes, queries)."""
    visible: Tensor
    """Keys that each query sees (queries,)."""


class Listed(NamedTuple):
    """The keys that a method attends."""

    ids: Tensor
    """(group, queries, listed), -1 only at the end."""
    attended: Tensor
    """How many of a list each budget reaches (group or 1, queries or 1, budgets)."""
    extra_keys: Tensor
    """How many of them come besides the budget (queries or 1,)."""
    sink: int
    """Keys before this position did not have to be found."""
    first_given: Tensor
    """Nor those from these on (queries, budgets or 1); nothing if none."""


class Exactly(NamedTuple):
    """What exact attention answers, and what its scores come from."""

    best: Tensor
    """The best keys (group, queries, ranks)."""
    first_budgets: Tensor
    """The first budget that a key of each rank counts for (ranks + 1,)."""
    logs: Tensor
    """log of the probability of each of the best keys, float64."""
    probabilities: Tensor
    masses: Tensor
    """Attention mass on the first 0, 1, ... of them (group, queries, ranks + 1) float64."""
    output: Tensor
    """(group, queries, value channels) float32."""
    queries: Tensor
    """(group, queries, channels) float32."""
    keys: Tensor
    """(keys, channels) float32."""
    values: Tensor
    """(keys, value channels) float32."""
    log_normalizer: Tensor
    """log of each softmax's denominator (group, queries) float64."""
    scale: float
    """Factor of inner products."""
    bound: float
    """Bound of scores, 0 for none."""


class Answered(NamedTuple):
    """How the method's output comes of what is attended, and what it reads."""

    renormalised: bool
    """Whether it is divided by what is attended."""
    log_sink_mass: Tensor
    """log of the mass in the denominator besides (group, queries) float64."""
    share: Tensor
    """Share of the output that attended keys have (points, group, queries) float64; nothing where
    they have all."""
    fill: Tensor
    """What has the rest (queries, value channels)."""
    errors: Tensor
    """Error norms (points, group, queries), where the method gave the output itself; else
    nothing."""
    bytes_each: float
    """Of an attended key and value."""
    bytes_full: float
    """Of one that is read in full."""
    bytes_aux: Tensor
    """Read to find keys (queries,) float64."""


class Summed(NamedTuple):
    """Counts, means and sums of squared deviations over queries."""

    at_all: Doubles
    """(group, `AT_ALL`, 3, budgets)."""
    at_points: Doubles
    """(group, `AT_POINTS`, 3, points)."""
    by_bucket: Doubles
    """Of the queries in each bucket of each axis (axes, buckets, group, `BUCKETED`, 3, points)."""
    every_query: Floats
    """What every query comes to (points, `TAILED`, group, queries), NaN where it does not count."""
    limits: Doubles
    """The largest number that each metric can come to, of `AT_ALL` and of `AT_POINTS`."""
    wrong: Ids
    """Metric, head and query of the first figure that cannot be; -1 if there is none."""
    wrong_number: Doubles
    """That figure (1,)."""

    @property
    def refused(self) -> tuple[str, float, int, int] | None:
        """The first figure that cannot be: its metric, the number, the head of the group and the
        query; None if there is none."""
        metric, head, query = self.wrong.tolist()
        if metric < 0:
            return None
        return (*AT_ALL, *AT_POINTS)[metric], float(self.wrong_number[0]), head, query


def moments(
    asked: Asked, listed: Listed, exact: Exactly, answered: Answered, limits: tuple[float, ...]
) -> Summed:
    """All metrics of a block's queries; `limits` are as in `Summed`."""
    group, queries, _ = listed.ids.shape
    axes, budgets, points = len(asked.buckets), len(asked.ks), len(asked.points)
    size = int(asked.buckets.max()) + 1
    summed = Summed(
        np.zeros((group, len(AT_ALL), 3, budgets)),
        np.zeros((group, len(AT_POINTS), 3, points)),
        np.zeros((axes, size, group, len(BUCKETED), 3, points)),
        np.full((points, len(TAILED), group, queries), np.nan, np.float32),
        np.array(limits),
        np.full(3, -1),
        np.zeros(1),
    )
    _moments(_plain(asked), _plain(listed), _plain(exact), _plain(answered), summed)
    return summed


def first_budgets(ks: Tensor, ranks: int) -> Tensor:
    """The first budget that a key of each rank counts for (ranks + 1,)."""
    return torch.searchsorted(ks, torch.arange(ranks + 1), right=True)


def _plain(fields: Any) -> Any:
    """The same tuple, its tensors as arrays."""
    return type(fields)(*(f.contiguous().numpy() if isinstance(f, Tensor) else f for f in fields))


@compiled
def _moments(asked: Any, listed: Any, exact: Any, answered: Any, summed: Any) -> None:
    """`moments`, over arrays in place of tensors."""
    ks, points, buckets, visible = asked.ks, asked.points, asked.buckets, asked.visible
    ids, attended, first_given = listed.ids, listed.attended, listed.first_given
    at_all, at_points, by_bucket = summed.at_all, summed.at_points, summed.by_bucket
    values, share, fill = exact.values, answered.share, answered.fill
    limits, wrong, wrong_number = summed.limits, summed.wrong, summed.wrong_number
    group, rows, most_listed = ids.shape
    at_heads, at_queries, budgets = attended.shape
    reached = np.empty((group, budgets), np.int64)
    hits, wanted = np.empty((3, budgets), np.int64), np.empty(budgets, np.int64)
    found = np.empty((len(AT_ALL), budgets))
    seen = np.empty((len(AT_POINTS), len(points)))
    one_in = np.empty(budgets)
    one_in_points = np.empty(len(points))
    one_in_bucket = np.empty((len(buckets), len(points)))
    told = np.empty(len(points))
    union_of = np.full(len(values), -1, np.int64)
    unions = np.empty(len(points))
    places = np.full(len(values), -1, np.int64)
    ranks = np.empty(most_listed, np.int64)
    logs, probabilities = np.empty(most_listed), np.empty(most_listed)
    sums = np.empty(values.shape[1], np.float32)
    nothing = np.empty(0, np.int64)
    anything_given = listed.sink > 0 or len(first_given) > 0
    for q in range(rows):
        most, reads = asked.counted_budgets[q], asked.counted_points[q]
        given = first_given[q] if len(first_given) else nothing
        extra = listed.extra_keys[q % len(listed.extra_keys)]
        for h in range(group):
            count = _count(ids[h, q])
            reach = attended[h % at_heads, q % at_queries]
            for b in range(most):
                reached[h, b] = min(reach[b], count)
        _union(ids[:, q], reached, points[:reads], q, union_of, unions)
        # Queries count for ever more budgets, so that heads and metrics have one count.
        _count_one(at_all[0, RECALL, COUNT], one_in[:most])
        _count_one(at_points[0, DENSITY, COUNT], one_in_points[:reads])
        for axis in range(len(buckets)):
            _count_one(by_bucket[axis, buckets[axis, q], 0, 0, COUNT], one_in_bucket[axis, :reads])
        for h in range(group):
            walked = reached[h, most - 1] if most else 0
            best = exact.best[h, q]
            _rank(best, (q * group + h) * len(best), places, ids[h, q, :walked], ranks)
            _probabilities(ids[h, q, :walked], ranks, exact, h, q, logs, probabilities)
            _recalls(
                ids[h, q], ranks, exact.first_budgets, ks[:most], reached[h], extra,
                listed.sink, given, hits,
            )  # fmt: skip
            for b in range(most):
                found[RECALL, b] = hits[ALL, b] / min(ks[b], visible[q])
                found[ATTENDED_RECALL, b] = hits[ATTENDED, b] / min(ks[b], visible[q])
            if anything_given:
                _wanted(best, ks[:most], listed.sink, given, wanted)
                for b in range(most):
                    # Not counted where nothing had to be found.
                    found[CANDIDATE_RECALL, b] = (
                        hits[TO_FIND, b] / wanted[b] if wanted[b] else np.nan
                    )
                _add_numbers(at_all[h, CANDIDATE_RECALL], found[CANDIDATE_RECALL, :most])
            _masses(probabilities, reached[h], found[FRACTION, :most])
            for b in range(most):
                found[EXACT_FRACTION, b] = exact.masses[h, q, ks[b]]
            _top1_hits(ranks[:walked], reached[h], found[TOP1_HIT, :most])
            for metric in EVERY_QUERYS:
                _add(at_all[h, metric], found[metric, :most], one_in)
            if len(answered.errors):
                for p in range(reads):
                    seen[ERROR_NORM, p] = answered.errors[p, h, q]
            else:
                _error_norms(
                    ids[h, q], logs, probabilities, values, exact.output[h, q], reached[h],
                    points[:reads], answered.renormalised, answered.log_sink_mass[h, q],
                    share[:, h % share.shape[1], q % share.shape[2]],
                    fill[q if len(fill) else 0 :], sums, seen[ERROR_NORM],
                )  # fmt: skip
            # What is attended only grows, so that the last budget is the one to look at.
            for metric in EVERY_QUERYS:
                if most > 0:
                    _note_wrong(metric, found[metric, most - 1], limits, h, q, wrong, wrong_number)
            whole = visible[q] * answered.bytes_full
            for p in range(reads):
                seen[DENSITY, p] = reached[h, points[p]] / visible[q]
                seen[BYTES_RATIO, p] = (
                    unions[p] * answered.bytes_each + answered.bytes_aux[q]
                ) / whole
            for metric in range(len(seen)):
                _add(at_points[h, metric], seen[metric, :reads], one_in_points)
                for p in range(reads):
                    at = len(found) + metric
                    _note_wrong(at, seen[metric, p], limits, h, q, wrong, wrong_number)
            for i in range(len(KEPT)):
                metric, at_budgets = KEPT[i]
                for p in range(reads):
                    summed.every_query[p, i, h, q] = (
                        found[metric, points[p]] if at_budgets else seen[metric, p]
                    )
            for i in range(len(TOLD)):
                metric, at_budgets = TOLD[i]
                for p in range(reads):
                    told[p] = found[metric, points[p]] if at_budgets else seen[metric, p]
                for axis in range(len(buckets)):
                    _add(
                        by_bucket[axis, buckets[axis, q], h, i],
                        told[:reads],
                        one_in_bucket[axis],
                    )
    for h in range(group):
        # Number by number: a slice set to a slice takes five seconds more to compile.
        for b in range(budgets):
            for metric in EVERY_QUERYS:
                at_all[h, metric, COUNT, b] = at_all[0, RECALL, COUNT, b]
        for p in range(len(points)):
            for metric in range(len(seen)):
                at_points[h, metric, COUNT, p] = at_points[0, DENSITY, COUNT, p]
            for axis in range(len(by_bucket)):
                for bucket in range(by_bucket.shape[1]):
                    count = by_bucket[axis, bucket, 0, 0, COUNT, p]
                    for i in range(len(TOLD)):
                        by_bucket[axis, bucket, h, i, COUNT, p] = count


@compiled
def _note_wrong(
    metric: int, number: float, limits: Doubles, head: int, query: int, wrong: Ids, told: Doubles
) -> None:
    """Note the first figure that is NaN, below 0 or above its limit."""
    if not (number >= 0.0 and number <= limits[metric]) and wrong[0] < 0:
        wrong[0], wrong[1], wrong[2] = metric, head, query
        told[0] = number


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
def _union(ids: Ids, reached: Ids, points: Ids, query: int, union_of: Ids, unions: Doubles) -> None:
    """Distinct keys that any head attends at each point. `union_of` (keys,) holds the last query
    that had each key in its union."""
    distinct = 0
    for p in range(len(points)):
        before, until = points[p - 1] if p else -1, points[p]
        for h in range(len(ids)):
            for place in range(reached[h, before] if p else 0, reached[h, until]):
                key = ids[h, place]
                if union_of[key] != query:
                    union_of[key] = query
                    distinct += 1
        unions[p] = distinct


@compiled
def _rank(best: Ids, base: int, places: Ids, ids: Ids, ranks: Ids) -> None:
    """The exact rank of each listed key, the number of ranks where it has none. `places` (keys,)
    holds nothing from `base` on before, and rank `base + r` for each of the best keys after."""
    count = len(best)
    for rank in range(count):
        if best[rank] >= 0:
            places[best[rank]] = base + rank
    for i in range(len(ids)):
        rank = places[ids[i]] - base
        ranks[i] = rank if rank >= 0 else count


@compiled_sums
def _probabilities(
    ids: Ids, ranks: Ids, exact: Any, head: int, query: int, logs: Doubles, probabilities: Doubles
) -> None:
    """The exact probability of each key that a query lists, and its log: of those without a rank
    from their score."""
    best, best_logs = exact.probabilities[head, query], exact.logs[head, query]
    for i in range(len(ids)):
        if ranks[i] < len(best):
            logs[i] = best_logs[ranks[i]]
            probabilities[i] = best[ranks[i]]
            continue
        found = score(exact.queries[head, query], exact.keys[ids[i]], exact.scale, exact.bound)
        logs[i] = found - exact.log_normalizer[head, query]
        probabilities[i] = np.exp(logs[i])


@compiled
def _top1_hits(ranks: Ids, reached: Ids, hits: Doubles) -> None:
    """1 where what a budget reaches of a list holds the best key, else 0."""
    place = 0
    while place < len(ranks) and ranks[place] > 0:
        place += 1
    for b in range(len(hits)):
        hits[b] = 1.0 if place < reached[b] else 0.0


@compiled
def _recalls(
    ids: Ids,
    ranks: Ids,
    first_budgets: Ids,
    ks: Ids,
    reached: Ids,
    extra_keys: int,
    sink: int,
    first_given: Ids,
    hits: Ids,
) -> None:
    """How many of the listed keys are among the k best and attended, at every budget k: of the
    list's k best-ranked, of all, and of those k that had to be found (3, budgets)."""
    budgets, place, attended = len(ks), 0, 0
    hits[:, :budgets] = 0
    for b in range(budgets):
        # Those that this budget is the first to reach are hits from it on, or from where their
        # exact rank is within the budget.
        while attended < reached[b]:
            at = max(b, first_budgets[ranks[attended]])
            if at < budgets:
                hits[ATTENDED, at] += 1
            attended += 1
        while place < min(reached[b], ks[b] + extra_keys):
            at = max(b, first_budgets[ranks[place]])
            if at < budgets:
                hits[ALL, at] += 1
            until = _given_from(ids[place], sink, first_given, budgets)
            if at < until:
                hits[TO_FIND, at] += 1
                if until < budgets:
                    hits[TO_FIND, until] -= 1
            place += 1
    for b in range(1, budgets):
        for of in range(len(hits)):
            hits[of, b] += hits[of, b - 1]


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
    logs: Doubles,
    probabilities: Doubles,
    values: Floats,
    output: Floats,
    reached: Ids,
    points: Ids,
    renormalised: bool,
    log_sink_mass: float,
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
    # Squares in float64, in which none overflows or vanishes.
    norm = 0.0
    for c in range(channels):
        norm += np.float64(output[c]) * np.float64(output[c])
    # Sums are relative to the largest so far, since probabilities of what was selected may be tiny;
    # where they vanish, their logs stand in.
    place, total, peak, one_in = 0, 0.0, LEAST_LOG, 0.0
    for p in range(len(points)):
        stop = reached[points[p]]
        reading = True
        while reading:
            # Four keys at once, and the last of a point together with its error, so that sums are
            # read and written less often.
            count = min(4, stop - place)
            largest = peak
            for j in range(place, place + count):
                largest = max(largest, logs[j])
            if largest > peak:
                smaller = np.exp(peak - largest)
                total *= smaller
                for c in range(channels):
                    sums[c] *= np.float32(smaller)
                peak, one_in = largest, np.exp(-largest) if largest > VANISHING else 0.0
            # Fewer than four are filled up with the first, at no weight.
            k0 = k1 = k2 = k3 = ids[place] if count > 0 else 0
            w0 = w1 = w2 = w3 = np.float32(0.0)
            if count > 0:
                w0 = _weight(logs[place], probabilities[place], peak, one_in)
            if count > 1:
                k1 = ids[place + 1]
                w1 = _weight(logs[place + 1], probabilities[place + 1], peak, one_in)
            if count > 2:
                k2 = ids[place + 2]
                w2 = _weight(logs[place + 2], probabilities[place + 2], peak, one_in)
            if count > 3:
                k3 = ids[place + 3]
                w3 = _weight(logs[place + 3], probabilities[place + 3], peak, one_in)
            total += (np.float64(w0) + w1) + (np.float64(w2) + w3)
            place += count
            reading = place < stop
            if reading:
                for c in range(channels):
                    sums[c] += (w0 * values[k0, c] + w1 * values[k1, c]) + (
                        w2 * values[k2, c] + w3 * values[k3, c]
                    )
                continue
            if renormalised:
                whole = total + np.exp(log_sink_mass - peak)
                factor = 1.0 / whole if whole > 0.0 else 1.0
            else:
                factor = np.exp(peak)
            error = 0.0
            part = np.float32(share[p] * factor if len(share) else factor)
            if count > 0:
                for c in range(channels):
                    sums[c] += (w0 * values[k0, c] + w1 * values[k1, c]) + (
                        w2 * values[k2, c] + w3 * values[k3, c]
                    )
                    rest = np.float64(output[c] - part * sums[c])
                    error += rest * rest
            elif not len(share):
                for c in range(channels):
                    rest = np.float64(output[c] - part * sums[c])
                    error += rest * rest
            if len(share):
                error, other = 0.0, np.float32(1.0 - share[p])
                for c in range(channels):
                    rest = np.float64(output[c] - part * sums[c] - other * fill[0, c])
                    error += rest * rest
            errors[p] = np.sqrt(error / norm) if error != 0.0 else 0.0


@compiled
def _weight(log: float, probability: float, peak: float, one_in: float) -> np.float32:
    """exp(log - peak) of a key's probability, whose log is at most `peak`: `one_in` is 1 over that
    of the peak, 0 where it would overflow."""
    return np.float32(probability * one_in if one_in > 0.0 else np.exp(log - peak))


@compiled
def _count_one(counts: Doubles, one_in: Doubles) -> None:
    """Count a sample more in the first streams, and give one over each of their counts."""
    for i in range(len(one_in)):
        counts[i] += 1.0
        one_in[i] = 1.0 / counts[i]


@compiled
def _add(moments: Doubles, samples: Doubles, one_in: Doubles) -> None:
    """Add a sample each to the first streams (3, streams), as Welford (1962) does, where it is
    counted already."""
    mean, squares = moments[MEAN], moments[SQUARES]
    for i in range(len(samples)):
        apart = samples[i] - mean[i]
        mean[i] += apart * one_in[i]
        squares[i] += apart * (samples[i] - mean[i])


@compiled
def _add_numbers(moments: Doubles, samples: Doubles) -> None:
    """Count and add a sample each, where it is not NaN."""
    for i in range(len(samples)):
        if not np.isnan(samples[i]):
            moments[COUNT, i] += 1.0
            apart = samples[i] - moments[MEAN, i]
            moments[MEAN, i] += apart / moments[COUNT, i]
            moments[SQUARES, i] += apart * (samples[i] - moments[MEAN, i])
