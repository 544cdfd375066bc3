"""What a run will read, compute and take, by counting and by a slice that is replayed."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from retrace.analyze.exact.store import ReferenceStore
from retrace.analyze.methods.specs import MethodSpec
from retrace.analyze.replay.calibration import calibration
from retrace.analyze.replay.clock import Clock
from retrace.analyze.replay.engine import replay_unit
from retrace.analyze.replay.parts import Job
from retrace.analyze.replay.plan import Plan, Replayed
from retrace.analyze.replay.settings import Settings
from retrace.analyze.storage.journal import Task
from retrace.analyze.units.protocol import FIRST_BUILD, Protocol
from retrace.analyze.units.unit import HeadGroup, Unit, load_units
from retrace.traces import Layer

MEASURED = 2e10
"""Operations of the slice that is measured: about a second of one core's exact pass."""


@dataclass(frozen=True)
class Estimate:
    """What a run takes besides what its folder and the kept exact answers hold already."""

    tasks: int
    """Those that are left to replay, a layer of a sequence each."""
    units: int
    """kv heads of those."""
    bytes: int
    """Of queries, keys and values, each read once. Methods that look at other layers, calibration
    and the causality check read some of them again."""
    operations: int
    """Multiplications and additions of the exact pass, of all scores that its blocks compute."""
    scores: int
    """Scores of queries against keys, all heads, that each method chooses from."""
    workers: int
    seconds: float
    """Expected of them together, by a slice of one unit that was replayed, as if they did not slow
    each other down. The start of processes and the causality check, seconds that do not grow with
    the trace, are not in it."""

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def forecast(job: Job, tasks: Sequence[Task], store: ReferenceStore, workers: int) -> Estimate:
    """What some tasks of a run take.

    A slice of the longest sequence's first unit is replayed: its exact pass is scaled by
    operations, its search and metrics by scores, its building of states by keys, and a calibration
    of one layer, where it is not there yet, by layers.
    """
    trace = job.settings.trace
    works = [_work(job.plan, trace.layer(i), s, store) for i, s in tasks]
    rates = _measure(job.settings, job.plan, job.device) if tasks else _Rates(0.0, 0.0, 0.0, 0.0)
    seconds = sum(
        work.operations * rates.operation + work.scores * rates.score + work.keys * rates.key
        for work in works
    )
    return Estimate(
        len(tasks),
        sum(trace.layer(i).rules.kv_heads for i, _ in tasks),
        sum(work.bytes for work in works),
        sum(work.operations for work in works),
        sum(work.scores for work in works),
        workers,
        (seconds + rates.calibration) / min(workers, max(1, len(tasks))),
    )


@dataclass(frozen=True)
class _Work:
    """What a task takes."""

    bytes: int
    operations: int
    scores: int
    keys: int


@dataclass(frozen=True)
class _Rates:
    """Seconds of one worker for one of each, and for all calibrations."""

    operation: float
    score: float
    key: float
    calibration: float


def _work(plan: Plan, layer: Layer, sequence: int, store: ReferenceStore) -> _Work:
    rules, trace = layer.rules, layer.trace
    length = trace.length(sequence)
    positions = torch.from_numpy(layer.query_positions(sequence).astype("int64"))
    none = torch.empty(())
    unit = Unit(  # of the right shape, and no memory
        HeadGroup(layer.index, sequence, 0, rules),
        none.expand(rules.group, len(positions), rules.key_dim),
        positions,
        none.expand(length, rules.key_dim),
        none.expand(length, rules.value_dim),
        None,
    )
    elements = length * rules.kv_heads * (rules.key_dim + rules.value_dim)
    elements += len(positions) * rules.heads * rules.key_dim
    plan = plan.of_sequence(trace, sequence)
    first, computed = _first(plan, length), 0
    if not store.holds(trace.digest(sequence), layer.index):
        everything = replace(plan, within=None)
        computed = _scores(unit, everything, 0) if store.active else _scores(unit, plan, first)
        computed *= rules.kv_heads
    return _Work(
        elements * trace.dtype.itemsize,
        computed * 2 * (rules.key_dim + rules.value_dim),
        _scores(unit, plan, first) * rules.kv_heads,
        length * rules.kv_heads,
    )


def _scores(unit: Unit, plan: Plan, first: int) -> int:
    """Scores that a unit's blocks compute with a query that counts from a position on, those that
    are masked included."""
    blocks = (block for block in unit.blocks(first) if plan.counted(block.places, first))
    return sum(len(unit.queries) * len(block.positions) * block.end for block in blocks)


def _first(plan: Plan, length: int) -> int:
    """The first position that any method counts."""
    return min(plan.counting.first(method.ks[0], length) for method in plan.methods)


def _measure(settings: Settings, plan: Plan, device: torch.device) -> _Rates:
    """By a slice of a unit, in one thread as every worker's."""
    trace, layer = settings.trace, settings.layers[0]
    longest = max(settings.sequences, key=trace.length)
    unit = next(load_units(trace.layer(layer), longest, device))
    ready, learning = [], 0.0
    for method in plan.methods:
        ready.append(method)
        for one in method.each(len(unit.keys)):
            if not one.spec.method.calibrated or one.calibration:
                continue
            start = time.perf_counter()
            ready[-1] = _calibrated(settings, ready[-1], one.spec, layer, device)
            once = one.spec.method.learns == "model"
            learning += (time.perf_counter() - start) * (1 if once else len(settings.layers))
    plan = replace(plan, methods=tuple(ready))
    begin = _first(plan, len(unit.keys))
    operations = 2 * (unit.group.rules.key_dim + unit.group.rules.value_dim)
    whole = _scores(unit, plan, begin)
    step = max(1, int(whole * operations // MEASURED))
    together = plan.counting.protocol.block
    if any(method.spec.method.in_turn for method in plan.methods):  # queries with all before them
        some, few = (
            _beginning(unit, begin + 1 + (len(unit.keys) - begin) // part, together or 1)
            for part in (step, max(step, 8))
        )
    elif together is None:
        protocol, fewer = plan.counting.protocol, max(step, len(unit.positions) // 8)
        some, few = _some(unit, step, protocol), _some(unit, fewer, protocol)
    else:  # whole blocks of queries, with what comes before them
        some = _beginning(unit, int(len(unit.positions) / step**0.5), together)
        few = _beginning(unit, 1, together)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            plan = plan.of_unit(unit)
            replay_unit(few, plan, None, None, Clock(device))  # compiles what is compiled
            clock = Clock(device, wait=True)
            replay_unit(some, plan, None, None, clock)
    finally:
        torch.set_num_threads(before)
    scores = max(1, _scores(some, plan, begin))
    spent = {
        step: sum(seconds for charge, seconds in clock.seconds.items() if charge.step == step)
        for step in ("exact pass", "build", "search", "metrics", "locality")
    }
    return _Rates(
        spent["exact pass"] / (scores * operations),
        (spent["search"] + spent["metrics"] + spent["locality"]) / scores,
        spent["build"] / len(unit.keys),
        learning,
    )


def _some(unit: Unit, step: int, protocol: Protocol) -> Unit:
    """Every so many queries of a unit, and of those that select together with it, and the first
    ones: there are methods that judge keys by the queries before the end of the first past, or
    before each eviction."""
    rows = torch.arange(len(unit.positions), device=unit.positions.device)
    wanted = (rows % step == 0) | (rows < FIRST_BUILD)
    if protocol.evict is not None:
        first = protocol.first_query(len(unit.keys))
        wanted |= (first - 1 - unit.positions) % protocol.evict < FIRST_BUILD
    rows = rows[wanted]
    return replace(
        unit,
        queries=unit.queries[:, rows],
        positions=unit.positions[rows],
        neighbours=unit.neighbours and unit.neighbours.changed(lambda u: _some(u, step, protocol)),
    )


def _beginning(unit: Unit, positions: int, together: int) -> Unit:
    """The first so many positions of a unit, rounded up to blocks of queries."""
    end = -(-positions // together) * together
    return replace(
        unit,
        queries=unit.queries[:, :end],
        positions=unit.positions[:end],
        keys=unit.keys[:end],
        values=unit.values[:end],
        neighbours=unit.neighbours
        and unit.neighbours.changed(lambda u: _beginning(u, positions, together)),
    )


def _calibrated(
    settings: Settings, method: Replayed, spec: MethodSpec, layer: int, device: torch.device
) -> Replayed:
    """With what it, or one of a plan's methods, learns of one layer."""
    if settings.given is not None:
        learnt = settings.given.of(settings.trace, spec, (layer,))
    else:
        learnt = calibration(
            settings.trace, spec, settings.calibration, (layer,), device, keep=False
        )
    return method.having_learned(spec, learnt)
