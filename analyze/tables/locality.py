"""The table of how keys move from query to query, made of what was counted."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from retrace.analyze.metrics.locality import (
    ATTENDED,
    FIRST,
    QUERIES,
    REPEATED,
    RETURNED,
    SHARED,
    SIZES,
    SPANS,
    WINDOWS,
    WORKING,
    WRITTEN,
    Counts,
    Doubles,
    Locality,
    misses,
)
from retrace.analyze.replay.parts import Job
from retrace.analyze.replay.tally import Tally
from retrace.analyze.tables.columns import LOCALITY_COLUMNS
from retrace.traces import LayerRules

HEAD, GROUP = "head", "group"
"""What a cache serves: one query head, or all that share a kv head."""
KINDS = {
    "repeated": REPEATED,
    "returned": RETURNED,
    "first_read": FIRST,
    "just_written": WRITTEN,
}
"""Shares of the keys attended, which come to 1."""


def tabulate_locality(job: Job, tallies: Mapping[int, Sequence[Tally]]) -> pd.DataFrame:
    """A row for every figure of every cache that some query counts for.

    Args:
        job: the run.
        tallies: of all sequences of a layer, a tally for each method.
    """
    trace = job.settings.trace
    longest = max(map(trace.length, job.settings.sequences))
    sizes = min(len(SIZES), (longest - 1).bit_length() + 1)
    frames = [pd.DataFrame(columns=list(LOCALITY_COLUMNS))]
    for i, method in enumerate(job.plan.methods):
        for layer, of_layer in tallies.items():
            found = of_layer[i].locality
            if found is None:
                continue
            rules = trace.layer(layer).rules
            frame = _rows(found, of_layer[i].topk, rules, sizes)
            labels: dict[str, Any] = {
                "method": str(method.spec),
                "layer": layer,
                "module": rules.module,
            }
            frames.append(frame.assign(**labels)[list(LOCALITY_COLUMNS)])
    return pd.concat(frames, ignore_index=True).astype(LOCALITY_COLUMNS)


def _rows(found: Locality, topk: Sequence[int], rules: LayerRules, sizes: int) -> pd.DataFrame:
    """The rows of one method in one layer, without the columns that name these."""
    rows: dict[str, list[Any]] = {n: [] for n in ("cache", "head", "topk", "metric", "at")}
    rows |= {"mean": [], "count": []}
    for budget, k in enumerate(topk):
        for cache, head, counts, missed in _caches(found, budget, rules):
            figures = list(_figures(counts, missed, rules, sizes))
            if cache == GROUP:
                heads = found.counts[budget, head, : rules.group, ATTENDED].sum()
                distinct = _share(counts[ATTENDED], heads)
                count = counts[QUERIES] if heads else 0
                figures.append(("distinct", 0, distinct, count))
                if rules.group > 1:  # each key that a head attends makes as many pairs
                    overlap = _share(2 * counts[SHARED], heads * (rules.group - 1))
                    figures.append(("overlap", 0, overlap, count))
            for metric, at, mean, count in figures:
                if count:
                    row = (cache, head, k, metric, at, mean, count)
                    for name, value in zip(rows, row, strict=True):
                        rows[name].append(value)
    return pd.DataFrame(rows)


def _caches(
    found: Locality, budget: int, rules: LayerRules
) -> Iterator[tuple[str, int, Counts, Doubles]]:
    """What each cache serves, which head or kv head that is, and what it came to."""
    for kv_head in range(rules.kv_heads):
        counts, missed = found.counts[budget, kv_head], found.missed_bytes[budget, kv_head]
        for place in range(rules.group):
            yield HEAD, kv_head * rules.group + place, counts[place], missed[place]
        yield GROUP, kv_head, counts[-1], missed[-1]  # of one head, that one's


def _figures(
    counts: Counts, missed_bytes: Doubles, rules: LayerRules, sizes: int
) -> Iterator[tuple[str, int, float, int]]:
    """Metric, at what, mean, and over how many queries or spans of them."""
    queries, attended = int(counts[QUERIES]), counts[ATTENDED]
    for metric, place in KINDS.items():
        yield metric, 0, _share(counts[place], attended), queries if attended else 0
    for span, total, windows in zip(SPANS, counts[WORKING], counts[WINDOWS], strict=True):
        yield "working_set", span, _share(total, windows), int(windows)
    lacking, looked_up = misses(counts), attended - counts[WRITTEN]
    for size, missed, read in list(zip(SIZES, lacking, missed_bytes, strict=True))[:sizes]:
        rate = _share(looked_up - missed, looked_up)
        yield "hit_rate", size, rate, queries if looked_up else 0
        yield "misses", size, _share(missed, queries), queries
        if rules.cached_bytes is None:  # else all heads of the layer read one cache
            yield "link_bytes", size, _share(read, queries), queries


def _share(part: Any, whole: Any) -> float:
    """One number over another; 0 of nothing."""
    return float(part) / float(whole) if whole else 0.0
