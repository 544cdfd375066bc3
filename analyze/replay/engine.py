"""The replay engine: one exact pass over a layer and sequence, shared by methods and budgets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from retrace.analyze.exact.reference import (
    CORRECTED,
    KEPT_RANKS,
    KeptReferences,
    Reference,
    ReferenceStore,
    exact_pass,
    holds_no_scores,
    refuse_unheld,
)
from retrace.analyze.methods.base import ScoreMethod
from retrace.analyze.methods.exact import Exact
from retrace.analyze.methods.hooks import naming
from retrace.analyze.methods.registry import MethodSpec
from retrace.analyze.metrics.buckets import buckets_of
from retrace.analyze.metrics.histogram import Histogram
from retrace.analyze.metrics.measure import ExactBlock, Tallied, tally
from retrace.analyze.metrics.moments import Moments, empty
from retrace.analyze.metrics.registry import AT_ALL, AT_POINTS, COMPARED
from retrace.analyze.replay.clock import Charge, Clock
from retrace.analyze.replay.counting import Counting
from retrace.analyze.selection.select import select
from retrace.analyze.selection.states import Calibration, Cost, States
from retrace.analyze.units.seals import WrittenInto
from retrace.analyze.units.unit import Block, Unit, intact, load_units
from retrace.traces import RetraceError, Trace

EXACT = Exact()
"""Its selection is the exact pass itself."""
EVERY_BUDGET_TO = 256
"""Curves have a point at every budget up to here, and further ones evenly on a log scale."""


@dataclass(frozen=True)
class Replayed:
    """One method at the budgets asked for."""

    spec: MethodSpec
    topk: tuple[int, ...]
    """Ascending."""
    calibration: Calibration = field(default_factory=dict, compare=False)

    @property
    def ks(self) -> tuple[int, ...]:
        """The budgets at which recall and attention fraction are measured: all on the way where
        one ranked list holds them, otherwise those asked for."""
        method = self.spec.method
        if not isinstance(method, ScoreMethod) or not method.nested:
            return self.topk
        return curve_budgets(self.topk)


@dataclass(frozen=True)
class Plan:
    """What is replayed, and under which rules; the same for every unit."""

    methods: tuple[Replayed, ...]
    counting: Counting
    block_elements: int | None = None
    """Scores held at once."""

    @property
    def ranks(self) -> int:
        """Exact ranks that the largest budget needs."""
        return max(method.topk[-1] for method in self.methods)


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
    errors: Histogram | None = None
    """Of the error norms (topk, heads); None of no queries."""
    cost: Cost = field(default_factory=Cost)

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
        by_bucket, errors = tallied.by_bucket, tallied.errors
        if asked != self.topk:
            ours = [self.topk.index(k) for k in asked]
            errors = errors.spread(ours, len(self.topk))
            by_bucket = {
                axis: moments.spread(ours, len(self.topk), axis=1)
                for axis, moments in by_bucket.items()
            }
        self._merge_buckets(by_bucket)
        self._merge_errors(errors)

    def merge(self, other: "Tally") -> None:
        """Add another sequence's queries."""
        self.cost.merge(other.cost)
        for ours, theirs in ((self.at_all, other.at_all), (self.at_points, other.at_points)):
            for metric, moments in theirs.items():
                ours[metric] = ours[metric].merge(moments) if metric in ours else moments
        self._merge_buckets(other.by_bucket)
        if other.errors is not None:
            self._merge_errors(other.errors)

    def _merge_errors(self, errors: Histogram) -> None:
        self.errors = errors if self.errors is None else self.errors.merge(errors)

    def _merge_buckets(self, by_bucket: dict[str, Moments]) -> None:
        for axis, moments in by_bucket.items():
            known = self.by_bucket.get(axis)
            self.by_bucket[axis] = moments if known is None else known.merge_longer(moments)


def curve_budgets(topk: Sequence[int]) -> tuple[int, ...]:
    """Every budget up to the largest asked for; thinned beyond `EVERY_BUDGET_TO`."""
    largest = max(topk)
    budgets = set(range(1, min(largest, EVERY_BUDGET_TO) + 1)) | set(topk)
    k = float(EVERY_BUDGET_TO)
    while k < largest:
        k *= 2 ** (1 / 16)
        budgets.add(min(int(k), largest))
    return tuple(sorted(budgets))


def replay(
    trace: Trace,
    layer: int,
    sequence: int,
    plan: Plan,
    device: torch.device,
    store: ReferenceStore,
    clock: Clock,
) -> list[Tally]:
    """Replay every method of the plan against one layer of one sequence, all its heads.

    Returns one tally per method, in the plan's order. Units and tasks are independent: merged in
    the plan's order they give the same figures wherever they ran.
    """
    with clock.charge("read"):
        units = load_units(trace.layer(layer), sequence, device)
    digest = trace.digest(sequence) if store.active else ""
    kept: KeptReferences | None = None
    fresh: KeptReferences | None = None
    heads: list[list[Tally]] = []
    while True:
        with clock.charge("read"):
            unit = next(units, None)
        if unit is None:
            break
        if store.active and not heads:
            with clock.charge("exact answers read"):
                kept = store.load(digest, layer, unit, plan.ranks)
        if store.active and kept is None and fresh is None:
            fresh = KeptReferences.allocate(unit, max(plan.ranks, KEPT_RANKS))
        again = partial(_again, trace, unit)
        heads.append(_replay_intact(unit, plan, kept, fresh, clock, again))
    if fresh is not None:
        with clock.charge("exact answers kept"):
            store.save(digest, layer, fresh)
    return [_whole_layer(tallies) for tallies in zip(*heads, strict=True)]


def _again(trace: Trace, unit: Unit) -> Unit:
    """A unit, read anew."""
    group = unit.group
    layer = trace.layer(group.layer)
    units = load_units(layer, group.sequence, unit.keys.device)
    return next(unit for unit in units if unit.group.kv_head == group.kv_head)


def _replay_intact(
    unit: Unit,
    plan: Plan,
    kept: KeptReferences | None,
    fresh: KeptReferences | None,
    clock: Clock,
    again: Callable[[], Unit],
) -> list[Tally]:
    """`replay_unit`, less whatever comes of a unit that a method wrote into: that method is named,
    by replaying each alone on a unit of its own, which `again` reads."""
    try:
        with intact(unit):
            return replay_unit(unit, plan, kept, fresh, clock)
    except WrittenInto as error:
        asked = [method for method in plan.methods if method.spec.method != EXACT]
        for method in asked if len(asked) > 1 else ():
            own = again()
            try:
                with intact(own):
                    replay_unit(own, replace(plan, methods=(method,)), None, None, clock.another())
            except WrittenInto as alone:
                raise RetraceError(f"{method.spec} {alone}") from None
            except RetraceError:
                continue  # another mistake, perhaps, of a method that wrote nothing
        names = " or ".join(str(method.spec) for method in asked)
        raise RetraceError(f"{names} {error}") from None


def replay_unit(
    unit: Unit,
    plan: Plan,
    kept: KeptReferences | None,
    fresh: KeptReferences | None,
    clock: Clock,
) -> list[Tally]:
    """One tally per method, with the heads of this unit only."""
    length, protocol = len(unit.keys), plan.counting.protocol
    smallest = min(method.topk[0] for method in plan.methods)
    any_curve = any(method.ks != method.topk for method in plan.methods)
    first = plan.counting.first(1 if any_curve else smallest, length)
    tallies = [Tally(m.ks, m.topk) for m in plan.methods]
    states = [States(m.spec.method, unit, protocol, m.calibration) for m in plan.methods]
    # Answers that are kept for later runs must not depend on which queries this one counts.
    begin = 0 if fresh is not None else first
    ranks = plan.ranks if fresh is None else max(plan.ranks, KEPT_RANKS)
    buckets = buckets_of(unit.positions, length, protocol)
    answering = "exact pass" if kept is None else "exact answers read"
    with clock.charge(answering):
        exact_answers = _exact_answers(unit, begin, ranks, kept, plan.block_elements)
    # One at a time: a block holds on to its scores.
    for block in unit.blocks(begin, plan.block_elements):
        with clock.charge(answering):
            reference = exact_answers(block)
            if fresh is not None:
                fresh.put(block, reference)
        counted = int(torch.searchsorted(block.positions, first))
        if counted == len(block.positions):
            continue
        with clock.charge("metrics"):
            rows = slice(counted, len(block.positions))
            exact = ExactBlock(block, reference, buckets[:, block.rows])
            if kept is not None and not exact.rows(rows, exact.no_rank).is_possible:
                # What is kept cannot be right.
                exact = ExactBlock(block, exact_pass(block, ranks), exact.buckets)
            # Kept or not, the same ranks: probabilities of further keys are taken otherwise.
            exact = exact.rows(rows, plan.ranks)
            refuse_unheld(exact.block, exact.reference)
        for method, found, state in zip(plan.methods, tallies, states, strict=True):
            with naming(method.spec):
                _replay_method(method, exact, state, plan, found, clock)
    for method, found, state in zip(plan.methods, tallies, states, strict=True):
        with naming(method.spec):
            state.check_calibration()
        clock.seconds[Charge("build", str(method.spec))] += state.cost.seconds
        found.cost = state.cost
        _fill_missing(found, unit.group.rules.group)
    return tallies


def _exact_answers(
    unit: Unit,
    first_position: int,
    ranks: int,
    kept: KeptReferences | None,
    elements: int | None,
) -> Callable[[Block], Reference]:
    """What gives the exact answers of each of a unit's blocks from a position on."""
    if kept is not None:
        # No fewer than tell whether they can be right.
        return lambda block: kept.get(block, max(ranks, CORRECTED))
    block = next(unit.blocks(first_position, elements), None)
    if block is not None:
        first = block.rows.start
        everything = Block(unit, slice(first, len(unit.positions)))
        if holds_no_scores(everything, ranks):
            # One block of queries is too little work for a GPU.
            whole = exact_pass(everything, ranks)
            return lambda b: whole.part(slice(b.rows.start - first, b.rows.stop - first))
    return lambda block: exact_pass(block, ranks)


def _replay_method(
    method: Replayed,
    exact: ExactBlock,
    states: States,
    plan: Plan,
    found: Tally,
    clock: Clock,
) -> None:
    """Add a block's queries to a method's tally."""
    name = str(method.spec)
    length = len(exact.block.unit.keys)
    for served in states.serve(exact.block):
        rows = served.rows
        # What shares one list is selected together; otherwise only what counts for the budget.
        shared = isinstance(method.spec.method, ScoreMethod)
        for ks in [method.ks] if shared else [(k,) for k in method.topk]:
            begin = plan.counting.first(min(ks), length)
            start = int(torch.searchsorted(exact.block.positions[rows], begin))
            if rows.start + start >= rows.stop:
                continue
            with clock.charge("metrics", name):
                part = exact.rows(slice(rows.start + start, rows.stop))
            with clock.charge("search", name):
                if method.spec.method == EXACT:
                    selections = [part.selection(ks)]
                else:
                    selections = select(method.spec.method, served, part.block, ks)
            with clock.charge("metrics", name):
                for selection in selections:
                    points = [i for i, k in enumerate(selection.ks) if k in method.topk]
                    first = torch.tensor([plan.counting.first(k, length) for k in selection.ks])
                    found.add(selection.ks, points, tally(part, selection, points, first))


def _whole_layer(heads: Sequence[Tally]) -> Tally:
    """The tallies of a layer's kv heads as one."""
    layer = Tally(
        heads[0].ks,
        heads[0].topk,
        _side_by_side([head.at_all for head in heads]),
        _side_by_side([head.at_points for head in heads]),
        _side_by_side([head.by_bucket for head in heads]),
        Histogram.stack([head.errors for head in heads if head.errors is not None]),
    )
    for head in heads:
        layer.cost.merge(head.cost)
    return layer


def _side_by_side(parts: list[dict[str, Moments]]) -> dict[str, Moments]:
    return {name: Moments.stack([part[name] for part in parts], -1) for name in parts[0]}


def _fill_missing(tally: Tally, group: int) -> None:
    """A sequence too short for any query to count still has its place in the merge."""
    for metric in (metric for metric in AT_ALL if metric in COMPARED):
        tally.at_all.setdefault(metric, empty((len(tally.ks), group)))
    for metric in AT_POINTS:
        tally.at_points.setdefault(metric, empty((len(tally.topk), group)))
    if tally.errors is None:
        tally.errors = Histogram.empty((len(tally.topk), group))
