"""The replay engine: one exact pass over a layer and sequence, shared by methods and budgets.

A task's walk from reading to the tally enters each room once:

1. `traces` reads the layer's queries, keys and values of the sequence, one kv head at a time;
2. `units` makes a unit of each: a kv head, the queries that share it, and the layer's rules;
3. `exact` answers a block of its queries: best keys, normalizer, output; or finds them kept;
4. `metrics` puts the block, these answers and the queries' buckets side by side (`ExactBlock`),
   and in a prefill adds up what blocks of keys hold (`BlockMasses`);
5. `methods` build their state of what came before, as the protocol says (`selection.states`);
6. `selection` turns each method's answer into one list of keys for all its budgets;
7. `metrics` walks the lists of all queries that count, into moments over queries, and looks up
   the keys that the trace marks (`MarkedKeys`);
8. `replay.tally` adds them up block by block, and sets the heads of the layer side by side;
   bytes of a cache that these share are counted over all of them (`metrics.shared_cache`), and
   where it is asked for, keys are followed from query to query (`metrics.recency`), and errors
   projected, for which all heads answer block by block in step (`metrics.projection`);
9. `replay.parts` keeps the tallies, a part for each task, until all are there;
10. `tables` merges the parts in the order of the plan, and makes rows of them.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Self

import torch

from retrace.analyze.exact.reference import (
    CORRECTED,
    Reference,
    exact_pass,
    holds_no_scores,
    refuse_unheld,
)
from retrace.analyze.exact.store import KEPT_RANKS, KeptReferences, ReferenceStore
from retrace.analyze.methods.base import AttendMethod, BlockMethod, ScoreMethod
from retrace.analyze.methods.exact import Exact
from retrace.analyze.methods.hooks import naming
from retrace.analyze.metrics.buckets import buckets_of
from retrace.analyze.metrics.evidence import MarkedKeys
from retrace.analyze.metrics.measure import ExactBlock
from retrace.analyze.metrics.patterns import BlockMasses
from retrace.analyze.metrics.projection import ProjectedErrors, projection_of
from retrace.analyze.metrics.recency import RecentKeys
from retrace.analyze.metrics.shared_cache import SharedCacheReads
from retrace.analyze.metrics.tally import tally
from retrace.analyze.replay.clock import Charge, Clock
from retrace.analyze.replay.plan import Plan, Replayed
from retrace.analyze.replay.tally import Tally, fill_missing, whole_layer
from retrace.analyze.selection.select import select_together
from retrace.analyze.selection.served import Served
from retrace.analyze.selection.states import States
from retrace.analyze.units.seals import WrittenInto
from retrace.analyze.units.selection import Selection, joined
from retrace.analyze.units.unit import Block, Unit, intact, load_units
from retrace.traces import RetraceError, Trace

EXACT = Exact()
"""Its selection is the exact pass itself."""


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
    plan = plan.of_sequence(trace, sequence)
    digest = trace.digest(sequence) if store.active else ""
    kept: KeptReferences | None = None
    fresh: KeptReferences | None = None
    heads: list[list[Tally]] = []
    shared: list[SharedCacheReads] | None = None
    projected: list[ProjectedErrors] | None = None
    weights = projection_of(trace.layer(layer), device) if plan.projected else None
    together: list[Unit] = []
    while True:
        with clock.charge("read"):
            unit = next(units, None)
        if unit is None:
            break
        if store.active and not heads and not together:
            with clock.charge("exact answers read"):
                kept = store.load(digest, layer, unit, plan.ranks)
        if store.active and kept is None and fresh is None:
            fresh = KeptReferences.allocate(unit, max(plan.ranks, KEPT_RANKS))
        if shared is None and unit.group.rules.cached_bytes is not None:
            shared = [_shared_reads(unit, plan, method) for method in plan.methods]
        if weights is not None:
            together.append(unit)
            continue
        again = partial(_again, trace, unit)
        own = plan.of_unit(unit)
        heads.append(_replay_intact(unit, own, kept, fresh, clock, again, shared))
    if weights is not None:
        projected = [_projected_errors(together[0], plan, own, weights) for own in plan.methods]
        again_of = partial(_again, trace)
        heads = _replay_in_step(together, plan, kept, fresh, clock, again_of, shared, projected)
    heads = [
        [t.standing_for(m.ks, m.topk) for t, m in zip(tallies, plan.methods, strict=True)]
        for tallies in heads
    ]
    if fresh is not None:
        with clock.charge("exact answers kept"):
            store.save(digest, layer, fresh)
    layers = [whole_layer(tallies) for tallies in zip(*heads, strict=True)]
    for found, reads in zip(layers, shared or (), strict=shared is not None):
        found.at_points["bytes_ratio"] = reads.ratios(trace.layer(layer).rules.heads)
    for found, errors in zip(layers, projected or (), strict=projected is not None):
        found.projected = errors.moments
    return layers


def _projected_errors(
    unit: Unit, plan: Plan, method: Replayed, weights: torch.Tensor
) -> ProjectedErrors:
    """Where a method's errors after the output projection of a layer are noted."""
    first = [plan.counting.first(k, len(unit.keys)) for k in method.topk]
    heads = unit.group.rules.heads
    return ProjectedErrors(weights, heads, unit.positions, method.topk, first)


def _shared_reads(unit: Unit, plan: Plan, method: Replayed) -> SharedCacheReads:
    """Where what a method reads of a layer's cache is noted, unit after unit."""
    counted = torch.zeros(len(method.topk), len(unit.positions), dtype=torch.bool)
    for own, k in zip(counted, method.topk, strict=True):
        for rows in plan.counted(unit.places, plan.counting.first(k, len(unit.keys))):
            own[rows] = True
    return SharedCacheReads(unit.group.rules, unit.positions, method.topk, counted)


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
    shared: list[SharedCacheReads] | None,
) -> list[Tally]:
    """`replay_unit`, less whatever comes of a unit that a method wrote into: that method is named,
    by replaying each alone on a unit of its own, which `again` reads."""
    try:
        with intact(unit):
            return replay_unit(unit, plan, kept, fresh, clock, shared)
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


def _replay_in_step(
    units: Sequence[Unit],
    plan: Plan,
    kept: KeptReferences | None,
    fresh: KeptReferences | None,
    clock: Clock,
    again: Callable[[Unit], Unit],
    shared: Sequence[SharedCacheReads] | None,
    projected: Sequence[ProjectedErrors],
) -> list[list[Tally]]:
    """The tallies of all units of a layer, which answer each block of queries before the next."""
    heads: list[list[Tally]] = []
    try:
        with intact(*units):
            more = (kept, fresh, clock, shared, projected)
            steps = [_steps(unit, plan.of_unit(unit), *more) for unit in units]
            while not heads:
                # All have the same blocks, and so end together.
                for step in steps:
                    try:
                        next(step)
                    except StopIteration as done:
                        heads.append(done.value)
                for errors in projected:
                    with clock.charge("metrics"):
                        errors.finish()
    except WrittenInto:
        for unit in units:  # which names the method
            own = again(unit)
            _replay_intact(
                own, plan.of_unit(own), None, None, clock.another(), partial(again, own), None
            )
        raise
    return heads


def replay_unit(
    unit: Unit,
    plan: Plan,
    kept: KeptReferences | None,
    fresh: KeptReferences | None,
    clock: Clock,
    shared: Sequence[SharedCacheReads] | None = None,
) -> list[Tally]:
    """One tally per method, with the heads of this unit only; what they read of a cache that the
    layer's heads share is noted in `shared`, method by method."""
    steps = _steps(unit, plan, kept, fresh, clock, shared, None)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            tallies: list[Tally] = done.value
            return tallies


def _steps(
    unit: Unit,
    plan: Plan,
    kept: KeptReferences | None,
    fresh: KeptReferences | None,
    clock: Clock,
    shared: Sequence[SharedCacheReads] | None,
    projected: Sequence[ProjectedErrors] | None,
) -> Generator[None, None, list[Tally]]:
    """`replay_unit`, which stops after each block of queries that count; what all heads put out is
    noted in `projected`, method by method."""
    length, protocol = len(unit.keys), plan.counting.protocol
    smallest = min(method.topk[0] for method in plan.methods)
    any_curve = any(method.ks != method.topk for method in plan.methods)
    first = plan.counting.first(1 if any_curve else smallest, length)
    tallies = [Tally(m.ks, m.topk) for m in plan.methods]
    states = [States(m.spec.method, unit, protocol, m.calibration) for m in plan.methods]
    recent = [RecentKeys(unit, m.topk) if plan.locality else None for m in plan.methods]
    # Answers that are kept for later runs must not depend on which queries this one counts.
    begin = 0 if fresh is not None else first
    ranks = plan.ranks if fresh is None else max(plan.ranks, KEPT_RANKS, fresh.ranks)
    buckets = buckets_of(unit.positions, length, protocol)
    masses = None if protocol.block is None else BlockMasses(unit, protocol.block)
    answering = "exact pass" if kept is None else "exact answers read"
    with clock.charge(answering):
        exact_answers = _exact_answers(unit, begin, ranks, kept, plan.block_elements)
    # One at a time: a block holds on to its scores.
    for block in unit.blocks(begin, plan.block_elements, protocol.block or 1):
        counted = plan.counted(block.places, first)
        if not counted and fresh is None:
            continue
        with clock.charge(answering):
            reference = exact_answers(block)
            if fresh is not None:
                fresh.put(block, reference)
        for rows in counted:
            with clock.charge("metrics"):
                exact = ExactBlock(block, reference, buckets[:, block.rows])
                if kept is not None and not exact.rows(rows, exact.no_rank).is_possible:
                    # What is kept cannot be right.
                    exact = ExactBlock(block, exact_pass(block, ranks), exact.buckets)
                # Kept or not, the same ranks: probabilities of further keys are taken otherwise.
                exact = exact.rows(rows, plan.ranks)
                refuse_unheld(exact.block, exact.reference)
                if masses is not None:
                    masses.add(exact)
                marked = MarkedKeys(exact, plan.evidence) if plan.evidence else None
            each = zip(plan.methods, tallies, states, recent, strict=True)
            for i, (method, found, state, keys) in enumerate(each):
                reads = None if shared is None else shared[i]
                errors = None if projected is None else projected[i]
                more = (reads, keys, marked)
                with naming(method.spec):
                    _replay_method(method, exact, state, plan, found, *more, clock, errors)
            yield
    patterns = None if masses is None else masses.moments()
    for method, found, state, keys in zip(plan.methods, tallies, states, recent, strict=True):
        with naming(method.spec):
            state.check_calibration()
        found.cost = state.cost
        found.patterns = patterns
        clock.seconds[Charge("build", str(method.spec))] += found.cost.seconds
        fill_missing(found, unit.group.rules.group)
        found.locality = None if keys is None else keys.found
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
    reads: SharedCacheReads | None,
    recent: RecentKeys | None,
    marked: MarkedKeys | None,
    clock: Clock,
    errors: ProjectedErrors | None = None,
) -> None:
    """Add a block's queries to a method's tally.

    However many states answer them, their lists are compared with exact attention together: there
    is too little to do for each.
    """
    name = str(method.spec)
    length = len(exact.block.unit.keys)
    # What shares one list, or what it is chosen from, is selected together; otherwise only what
    # counts for the budget.
    together = isinstance(method.spec.method, ScoreMethod | AttendMethod)
    at_once = isinstance(method.spec.method, ScoreMethod | BlockMethod)
    answers: dict[tuple[int, ...], list[_Answer]] = defaultdict(list)
    asked = [method.ks] if at_once else [(k,) for k in method.topk]
    first_rows = [exact.block.row_of(plan.counting.first(min(ks), length)) for ks in asked]
    for serves in _answered_together(states.serve(exact.block), together):
        for ks, first_row in zip(asked, first_rows, strict=True):
            counting = [_from_row(s, first_row) for s in serves if s.rows.stop > first_row]
            if not counting:
                continue
            rows = slice(counting[0].rows.start, counting[-1].rows.stop)
            with clock.charge("search", name):
                if method.spec.method == EXACT:
                    selections = [exact.rows(rows).selection(ks)]
                else:
                    block = exact.block.part(rows)
                    own = method.spec.method
                    selections = select_together(own, counting, block, ks, method.topk)
            for selection in selections:
                if reads is None:  # nobody asks
                    selection = replace(selection, unread=None)
                answers[selection.ks].append(_Answer(rows, selection))
    for ks, parts in answers.items():
        points = [i for i, k in enumerate(ks) if k in method.topk]
        first = [plan.counting.first(k, length) for k in ks]
        for _, alike in groupby(parts, lambda answer: answer.selection.kind):
            with clock.charge("metrics", name):
                answer = _Answer.of(list(alike))
                part = exact.rows(answer.rows)
                since = torch.tensor(first)
                tallied = tally(part, answer.selection, points, since)
                if marked is not None:
                    of_marked = marked.moments(answer.selection, answer.rows, points, since)
                    tallied.at_points.update(of_marked)
                found.add(ks, points, tallied)
                if reads is not None:
                    reads.add(part.block, answer.selection, points)
                if errors is not None:
                    errors.add(part, answer.selection, points)
            if recent is not None:
                with clock.charge("locality", name):
                    recent.add(part.block, answer.selection, points, first)


def _answered_together(serves: Iterable[Served], together: bool) -> Iterator[list[Served]]:
    """What is asked for at once: one state's queries, or `together` those of all states, apart
    from those that no state answers, and from those that find other keys rounded in a cache."""
    if together:
        for _, alike in groupby(serves, lambda served: (served.state is None, served.shown_at)):
            yield list(alike)
    else:
        yield from ([served] for served in serves)


def _from_row(served: Served, first: int) -> Served:
    """What is served to queries from a block's row on."""
    return replace(served, rows=slice(max(served.rows.start, first), served.rows.stop))


@dataclass(frozen=True)
class _Answer:
    """What a method attends for some of a block's queries."""

    rows: slice
    selection: Selection

    @classmethod
    def of(cls, parts: Sequence[Self]) -> Self:
        """Of several, one after the other."""
        rows = slice(parts[0].rows.start, parts[-1].rows.stop)
        return cls(rows, joined([part.selection for part in parts]))
