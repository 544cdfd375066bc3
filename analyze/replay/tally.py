"""What methods came to: moments over queries, block by block, head by head, then layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from retrace.analyze.metrics.locality import Locality
from retrace.analyze.metrics.measure import Tallied
from retrace.analyze.metrics.moments import Moments, empty
from retrace.analyze.metrics.registry import AT_ALL, AT_POINTS, COMPARED
from retrace.analyze.metrics.tails import EveryQuery, Tails, tails_of
from retrace.analyze.selection.states import Cost

TOLD = 4096
"""Queries that are held until their tails are counted."""


@dataclass
class Tally:
    """What one method came to in one layer: moments over queries, by metric."""

    ks: tuple[int, ...]
    topk: tuple[int, ...]
    at_all: dict[str, Moments] = field(default_factory=dict)
    """(ks, heads), by metric."""
    at_points: dict[str, Moments] = field(default_factory=dict)
    """(topk, heads), by metric."""
    by_bucket: dict[str, Moments] = field(default_factory=dict)
    """(buckets, topk, metrics of `BUCKETED`, heads), by axis; buckets as far as there are any."""
    tails: Tails | None = None
    """(topk, metrics of `TAILED`, heads); None of no queries."""
    locality: Locality | None = None
    """Of the budgets `topk`, kv head by kv head; None where nobody asked."""
    projected: Moments | None = None
    """Errors after the output projection (topk,); None where nobody asked or there is none."""
    cost: Cost = field(default_factory=Cost)
    told: list[EveryQuery] = field(default_factory=list, repr=False)
    """Queries that `tails` lacks until `count_tails` is called."""
    patterns: Moments | None = None
    """What each of `PATTERNS` holds (patterns, heads) of a sequence, where blocks of queries choose
    together: the trace's, whichever method."""

    def standing_for(self, ks: tuple[int, ...], topk: tuple[int, ...]) -> "Tally":
        """The same, if these are its budgets; of a kv head that has one of its own in a plan, its
        figures at that, in the place of the plan's."""
        if (ks, topk) == (self.ks, self.topk):
            return self
        place = [self.ks.index(k) for k in self.topk]
        at_all = {metric: moments.take(place) for metric, moments in self.at_all.items()}
        return replace(self, ks=ks, topk=topk, at_all=at_all)

    def add(self, ks: tuple[int, ...], points: list[int], tallied: Tallied) -> None:
        """Add a block's queries, at budgets `ks` and at those of them that `points` name."""
        asked = tuple(ks[i] for i in points)
        for known, new, given, budgets in (
            (self.at_all, tallied.at_all, ks, self.ks),
            (self.at_points, tallied.at_points, asked, self.topk),
        ):
            places = None if given == budgets else [budgets.index(k) for k in given]
            for metric, moments in new.items():
                if places is not None:
                    moments = moments.spread(places, len(budgets))
                known[metric] = known[metric].merge(moments) if metric in known else moments
        by_bucket, tails = tallied.by_bucket, tallied.tails
        if asked != self.topk:
            ours = [self.topk.index(k) for k in asked]
            tails = tails.spread(ours, len(self.topk))
            by_bucket = {
                axis: moments.spread(ours, len(self.topk), axis=1)
                for axis, moments in by_bucket.items()
            }
        self._merge_buckets(by_bucket)
        if isinstance(tails, Tails):
            self._merge_tails(tails)
            return
        self.told.append(tails)
        if sum(len(part.positions) for part in self.told) >= TOLD:
            self.count_tails()

    def count_tails(self) -> None:
        """Count the queries that are told and not counted yet."""
        if self.told:
            self._merge_tails(tails_of(self.told))
            self.told.clear()

    def merge(self, other: "Tally") -> None:
        """Add another sequence's queries."""
        self.cost.merge(other.cost)
        for ours, theirs in ((self.at_all, other.at_all), (self.at_points, other.at_points)):
            for metric, moments in theirs.items():
                ours[metric] = ours[metric].merge(moments) if metric in ours else moments
        self._merge_buckets(other.by_bucket)
        if other.tails is not None:
            self._merge_tails(other.tails)
        if other.patterns is not None:
            known = self.patterns
            self.patterns = other.patterns if known is None else known.merge(other.patterns)
        if other.locality is not None:
            moves = self.locality
            self.locality = other.locality if moves is None else moves.merge(other.locality)

        if other.projected is not None:
            errors = self.projected
            self.projected = other.projected if errors is None else errors.merge(other.projected)

    def _merge_tails(self, tails: Tails) -> None:
        self.tails = tails if self.tails is None else self.tails.merge(tails)

    def _merge_buckets(self, by_bucket: dict[str, Moments]) -> None:
        for axis, moments in by_bucket.items():
            known = self.by_bucket.get(axis)
            self.by_bucket[axis] = moments if known is None else known.merge_longer(moments)


def whole_layer(heads: Sequence[Tally]) -> Tally:
    """The tallies of a layer's kv heads as one."""
    layer = Tally(
        heads[0].ks,
        heads[0].topk,
        _side_by_side([head.at_all for head in heads]),
        _side_by_side([head.at_points for head in heads]),
        _side_by_side([head.by_bucket for head in heads]),
        Tails.stack([head.tails for head in heads if head.tails is not None]),
    )
    followed = [head.locality for head in heads if head.locality is not None]
    layer.locality = Locality.stack(followed) if followed else None
    for head in heads:
        layer.cost.merge(head.cost)
    patterns = [head.patterns for head in heads if head.patterns is not None]
    layer.patterns = Moments.stack(patterns, -1) if patterns else None
    return layer


def _side_by_side(parts: list[dict[str, Moments]]) -> dict[str, Moments]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: Moments.stack([_found(part, name) for part in parts], -1) for name in names}


def _found(part: dict[str, Moments], name: str) -> Moments:
    """A head's moments of a metric; of no samples where it has none, as one that keeps no keys has
    no recall of others."""
    return part[name] if name in part else empty(next(iter(part.values())).count.shape)


def fill_missing(tally: Tally, group: int) -> None:
    """A sequence too short for any query to count still has its place in the merge."""
    for metric in (metric for metric in AT_ALL if metric in COMPARED):
        tally.at_all.setdefault(metric, empty((len(tally.ks), group)))
    for metric in AT_POINTS:
        tally.at_points.setdefault(metric, empty((len(tally.topk), group)))
    tally.count_tails()
    if tally.tails is None:
        tally.tails = Tails.empty(len(tally.topk), group)
