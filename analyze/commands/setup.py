"""What a run comes to before it begins: what is asked for, less what its folder holds."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from retrace.analyze.arguments import (
    choose_calibration,
    choose_device,
    choose_layers,
    without_damaged,
)
from retrace.analyze.exact.store import ReferenceStore, exact_answers
from retrace.analyze.methods.specs import Methods, MethodSpec, parse_specs
from retrace.analyze.options import RunOptions
from retrace.analyze.replay.calibration_file import GivenCalibration
from retrace.analyze.replay.consecutive import check_followed
from retrace.analyze.replay.counting import Counting
from retrace.analyze.replay.kept import note_kept, outdated_among, outdated_besides
from retrace.analyze.replay.parts import PARTS, counting_of_parts
from retrace.analyze.replay.plan import Replayed
from retrace.analyze.replay.projecting import check_projected
from retrace.analyze.replay.settings import Settings
from retrace.analyze.replay.spans import EVIDENCE, check_name
from retrace.analyze.replay.trials import able_to_answer, able_to_learn
from retrace.analyze.results import Results
from retrace.analyze.storage.journal import Task
from retrace.analyze.tables.saved import SAVING, names_in
from retrace.analyze.units.protocol import Protocol
from retrace.traces import Location, RetraceError, Trace, open_trace
from retrace.traces.storage.lock import LOCK

log = logging.getLogger("retrace")

MOST_KEYS = 10_000_000
"""Of a budget: no context is longer."""
BEGUN = {PARTS, SAVING, LOCK}
"""What is in a folder before there are results."""
OWN = "metrics.parquet"
"""What all results of retrace have."""


@dataclass(frozen=True)
class Asked:
    """What a run is asked for."""

    trace: Trace
    specs: list[MethodSpec]
    optional: frozenset[str]
    """Methods that are left out, with a warning, where they cannot run."""
    topk: Sequence[int]
    options: RunOptions
    given: GivenCalibration | None = None
    """What methods have learnt elsewhere."""

    @classmethod
    def of(
        cls,
        trace: Trace | str | Location,
        methods: Methods,
        topk: Sequence[int],
        options: RunOptions,
    ) -> "Asked":
        """Open the trace and find the methods."""
        trace = trace if isinstance(trace, Trace) else open_trace(trace)
        if options["skip_damaged"]:
            trace = without_damaged(trace, choose_layers(trace, options["layers"]))
        specs, optional = parse_specs(methods)
        specs = able_to_answer(specs, Protocol.parse(options["protocol"]), optional)
        if options["part"] is not None:
            for spec in specs:
                spec.check_named()
        given = _given(trace, specs, optional, options)
        able = able_to_learn(trace, specs, optional) if given is None else _fitting(specs, given)
        return cls(trace, able, optional, topk, options, given)

    @property
    def folder(self) -> Path | None:
        """Where the results go; None for nowhere."""
        out = self.options["out"]
        return None if out is None else Path(out)


@dataclass(frozen=True)
class Settled:
    """What is left of it to do."""

    settings: Settings
    """What all methods of the run share."""
    wanted: list[Replayed]
    """The methods and budgets that are not there yet."""
    before: Results | None
    """What is there, less what is outdated."""
    noted: list[str]
    """What the folder says of outdated methods."""
    device: torch.device


def settle(asked: Asked) -> Settled:
    """Look up what the run's folder holds, and what that leaves to do."""
    options, folder, trace = asked.options, asked.folder, asked.trace
    if folder is not None and options["overwrite"]:
        refuse_other_things(folder)
        folder = None
    before = None if folder is None else earlier(folder)
    noted = [] if before is None else before.run.get("outdated", [])
    device, min_context = choose_device(options["device"]), options["min_context"]
    settings = Settings(
        trace,
        _counting(trace, options),
        choose_layers(trace, options["layers"]),
        _held_out(asked, before),
        asked.given,
    )
    if asked.given is not None:
        asked.given.check_sequences(trace, settings.sequences)
        log.info(
            "calibration: %s (%s); no sequence of %s is held out.",
            asked.given.path,
            asked.given.digest,
            trace.path,
        )
    for spec in asked.specs:
        settings.check_fits(spec)
    own = _budgets(asked, settings)
    budgets = tuple(sorted({k for ks in own.values() for k in ks}))
    if min_context is not None:
        budgets = settings.countable(budgets)
    elif folder is not None and (begun := _begun(folder, before)) is not None:
        budgets = settings.count_as(begun, budgets, folder)
    else:
        budgets = settings.count_alike(budgets)
    if not settings.counting.alike:
        for spec in asked.specs:
            spec.check_alike()
    if folder is not None and before is not None:
        settings.check_same(before.run, folder)
    if options["locality"]:
        check_followed(settings, asked.specs, budgets)
    if options["projected"]:
        check_projected(settings)
    own = {name: tuple(k for k in ks if k in budgets) for name, ks in own.items()}
    wanted, before = _still_wanted(settings, asked.specs, own, before, options)
    return Settled(settings, wanted, before, noted, device)


def _counting(trace: Trace, options: RunOptions) -> Counting:
    """What counts, as it is asked for."""
    where, evidence = options["where"], options["evidence"]
    if where is not None:
        check_name(trace, where, "--where")
    if evidence is not None:
        check_name(trace, evidence, "--evidence")
    elif EVIDENCE in trace.mark_names:
        evidence = EVIDENCE
    return Counting.asked(options["protocol"], options["min_context"], where, evidence)


def _begun(folder: Path, before: Results | None) -> Counting | None:
    """Which queries count in what a folder holds: results, or parts of some."""
    return counting_of_parts(folder) if before is None else Counting.recorded(before.run)


def _budgets(asked: Asked, settings: Settings) -> dict[str, tuple[int, ...]]:
    """The budgets, ascending, of each method; a plan says itself."""
    topk, context = asked.topk, settings.context
    found = {str(spec): spec.budgets(topk, context) for spec in asked.specs}
    for ks in found.values():
        if not ks or min(ks) < 1:
            raise RetraceError(f"top-k {', '.join(map(str, ks)) or 'missing'}: expected 1 or more.")
        if max(ks) > MOST_KEYS:
            raise RetraceError(f"top-k {max(ks)}: expected at most {MOST_KEYS:,} keys.")
    return {name: tuple(sorted(set(ks))) for name, ks in found.items()}


def _given(
    trace: Trace, specs: Sequence[MethodSpec], optional: frozenset[str], options: RunOptions
) -> GivenCalibration | None:
    """What is learnt already, where the run names a file of it, and it fits what is asked for."""
    file = options["calibration_from"]
    if file is None:
        return None
    if options["calibration_sequences"] is not None:
        raise RetraceError(
            "calibration_from takes the place of calibration_sequences: leave one out."
        )
    given = GivenCalibration.read(file)
    learn = [one for spec in specs for one in spec.each if one.method.calibrated]
    if not learn:
        raise RetraceError(f"No method here learns anything: leave {given.path} out.")
    for spec in learn:
        if str(spec) not in optional:
            given.of(trace, spec, choose_layers(trace, options["layers"]))
    return given


def _fitting(specs: Sequence[MethodSpec], given: GivenCalibration) -> list[MethodSpec]:
    """The methods less those that have learnt something else, which a warning names."""
    able = []
    for spec in specs:
        try:
            for one in spec.each:
                if one.method.calibrated:
                    given.check_method(one)
        except RetraceError as error:
            log.warning("Left out: %s", error)
        else:
            able.append(spec)
    return able


def _held_out(asked: Asked, before: Results | None) -> tuple[int, ...]:
    """The sequences that are for calibration."""
    if asked.given is not None:
        return ()
    sequences = asked.options["calibration_sequences"]
    if sequences is None and before is not None:
        sequences = before.run.get("calibration")
    if sequences is None and not any(spec.method.calibrated for spec in asked.specs):
        return ()
    return choose_calibration(asked.trace, sequences)


def earlier(folder: Path) -> Results | None:
    """The results that are in the folder; None where there are at most parts of some."""
    names = names_in(folder)
    if names <= BEGUN:
        return None
    if OWN not in names:
        raise _other_things(folder)
    try:
        return Results.load(folder)
    except RetraceError as error:
        raise RetraceError(
            f"{error} Choose another with --out, or replace it with --overwrite."
        ) from error


def refuse_other_things(folder: Path) -> None:
    """Refuse to replace what retrace did not write."""
    names = names_in(folder)
    if not names <= BEGUN and OWN not in names:
        raise _other_things(folder)


def _other_things(folder: Path) -> RetraceError:
    return RetraceError(
        f"{folder} is not empty, and no results folder of retrace: choose another with --out."
    )


def share(tasks: list[Task], index: int, count: int) -> list[Task]:
    """The tasks of one of so many parts."""
    if not 1 <= index <= count:
        raise RetraceError(f"Part {index}/{count}: expected 1/{count} to {count}/{count}.")
    if index > len(tasks):
        raise RetraceError(
            f"Part {index}/{count}: there are only {len(tasks)} layers of sequences."
        )
    return tasks[index - 1 :: count]


def _still_wanted(
    settings: Settings,
    specs: list[MethodSpec],
    budgets: Mapping[str, tuple[int, ...]],
    before: Results | None,
    options: RunOptions,
) -> tuple[list[Replayed], Results | None]:
    """The methods and budgets that are not there yet, and what is there less what is outdated."""
    protocol = settings.counting.protocol
    again = options["again"]
    if before is None:
        new = [(spec, budgets[str(spec)]) for spec in specs]
        return [Replayed(spec, ks, protocol=protocol) for spec, ks in new if ks], None
    asked = {str(spec): spec for spec in specs}
    made = {name: settings.made_by(spec) for name, spec in asked.items()}
    outdated = outdated_among(made, before.run["methods"])
    wanted = []
    for name, spec in asked.items():
        held = set(before.topk(name))
        if again:
            missing = tuple(sorted({*budgets[name], *held}))
        else:
            there = set() if name in outdated else held - before.incomplete(name)
            if options["locality"]:
                there &= before.followed(name)
            if options["projected"]:
                there &= before.with_projected(name)
            missing = tuple(k for k in budgets[name] if k not in there)
        if not options["locality"] and (lost := before.followed(name) & set(missing)):
            log.warning(
                "%s at %s is measured again, and its locality is dropped: give --locality too.",
                name,
                ", ".join(map(str, sorted(lost))),
            )
        if not options["projected"] and (lost := before.with_projected(name) & set(missing)):
            log.warning(
                "%s at %s is measured again, and its projected errors are dropped: give "
                "--projected too.",
                name,
                ", ".join(map(str, sorted(lost))),
            )
        if missing:
            wanted.append(Replayed(spec, missing, protocol=protocol))
    computed = {(str(method.spec), k) for method in wanted for k in method.topk}
    note_kept(
        (name, k, before.when(name, k))
        for name in asked
        for k in budgets[name]
        if (name, k) not in computed
    )
    before = before.without(asked.keys() if again else outdated)
    before.run["outdated"] = outdated_besides(
        specs, before.run["methods"], settings.made_by, settings.engine
    )
    return wanted, before


def reference_store(trace: Trace, keep: bool, create: bool = True) -> ReferenceStore:
    """Where exact answers are kept: beside the trace, if there is room and leave to write. With
    `create` the folder is there afterwards."""
    folder = exact_answers(trace.path) if keep else None
    if folder is None:
        return ReferenceStore(None)
    folder = folder.absolute()  # for workers that may stand elsewhere
    try:
        if create:
            folder.mkdir(exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
    except OSError as error:
        log.warning("Exact answers are not kept for later runs: %s.", error)
        return ReferenceStore(None)
    if free < 4 * trace.nbytes():
        log.warning("Exact answers are not kept for later runs: %s has little room.", folder)
        return ReferenceStore(None)
    return ReferenceStore(folder)
