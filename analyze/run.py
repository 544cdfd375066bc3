"""`analyze`: replay methods against a trace and keep what they come to."""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from retrace.analyze.counting import Counting
from retrace.analyze.damage import without_damaged
from retrace.analyze.forecast import Estimate, forecast
from retrace.analyze.hooks import naming
from retrace.analyze.kept import note_kept, outdated_among, outdated_besides
from retrace.analyze.methods.registry import Methods, MethodSpec, missing_libraries, parse_specs
from retrace.analyze.parts import PARTS, Job, KeptParts, clear_finished, counting_of_parts
from retrace.analyze.profile import Clock
from retrace.analyze.reference import ReferenceStore
from retrace.analyze.replay import Plan, Replayed
from retrace.analyze.results import FILES, PLOTS, Results
from retrace.analyze.results_folder import SAVED, SAVING, finish_saving
from retrace.analyze.scope import choose_calibration, choose_device, choose_layers
from retrace.analyze.select import CostError
from retrace.analyze.settings import Settings
from retrace.analyze.tabulate import tabulate
from retrace.analyze.tasks import Progress, replay_all
from retrace.analyze.trying import Trials, able_to_learn
from retrace.analyze.workers import WORTH_PROCESSES, is_here, start_workers
from retrace.traces import DamageError, Location, RetraceError, Trace, beside, open_trace
from retrace.traces.durable import within
from retrace.traces.lock import LOCK, check_files, locked_folder

log = logging.getLogger("retrace")

MOST_KEYS = 10_000_000
"""Of a budget: no context is longer."""
BEGUN = {PARTS, SAVING, LOCK}
"""What is in a folder before there are results."""
OWN = {"metrics.parquet", SAVED}
"""What only results of retrace have."""


def analyze(
    trace: Trace | str | Location,
    methods: Methods = ("exact",),
    topk: Sequence[int] = (10,),
    *,
    out: str | Path | None = None,
    protocol: str = "all",
    min_context: int | str | None = None,
    layers: Sequence[int] | None = None,
    calibration_sequences: Sequence[int] | None = None,
    device: str = "auto",
    workers: int | None = None,
    executor: Executor | str | None = None,
    part: tuple[int, int] | None = None,
    keep_exact: bool = True,
    overwrite: bool = False,
    again: bool = False,
    profile: bool = False,
    skip_damaged: bool = False,
    progress: Progress | None = None,
    announce: Callable[[Estimate], None] | None = None,
) -> Results:
    """Replay methods against a trace, without its model.

    Args:
        trace: a trace or where it is: a path or a URL.
        methods: one or several: method specs, such as `quest:page=32` or `./mine.py:Mine`, or
            methods as objects, as classes or as attention functions; or a mapping of labels, which
            stand in the results, to any of these. `all` is every installed one with its defaults,
            less those that this trace or environment cannot run, which warnings name. Classes of
            objects must be importable where other processes work.
        topk: budgets: keys per query and head.
        out: folder for the results. What is there already for this trace and these settings is
            kept and not computed again, as long as it comes from the same code
            (`retrace.analyze.provenance`), and each layer of a sequence is kept once it is
            finished, so that the same call goes on from there. None keeps the results in memory
            only.
        protocol: `all`, `all:R`, `prefix:P`; see `retrace.analyze.states.Protocol`.
        min_context: the first position that counts, for all budgets and every point of curves
            alike: 10 times the largest budget if None, or what the results that `out` holds began
            with, which a warning then says. `each` counts from position 10 k on for budget k, so
            that each budget has queries of its own.
        layers: indices of the layers to replay; all recorded ones if None.
        calibration_sequences: sequences that methods are calibrated on, and that no method of the
            run is evaluated on. By default those of the results that `out` holds; if there are
            none, the last quarter of the trace's if a method needs calibration, else none.
        device: `cpu`, `cuda` or `cuda:N`; `auto` is cuda where there is one, else cpu.
        workers: processes that share the work, or 1 to do it here; figures are the same for any
            number. By default there is one per core, as threads where the cores or the work are
            few. With `cuda` it is one per GPU, or one where the work is short: each sees a GPU of
            its own, and more workers than GPUs take them in turn.
        executor: what does the work instead: any executor of `concurrent.futures` or of its kind,
            or the address of a Dask scheduler. Its workers find the trace and loose files where
            this process does, and have this version of retrace.
        part: (i, n) replays only the i-th of n parts of the work, from 1 on, keeps it in `out` for
            `merge`, and returns the results of it alone.
        keep_exact: keep the exact answers, and what methods learn, beside a trace on a local disk,
            so that they are computed once however often it is analyzed.
        overwrite: throw away what is in `out`.
        again: compute these methods again at every budget that `out` holds or that is asked for,
            and what they learn, though nothing that they depend on is known to have changed: for
            what nobody sees, such as files that they read and do not name in `reads`.
        profile: wait for a GPU after every step, so that `Results.profile` tells what each takes;
            without a GPU it does so anyway.
        skip_damaged: read all first, and leave out the sequences of which something is damaged in
            these layers; warnings name them, and the results' facts do. Otherwise damage ends the
            run.
        progress: told how far it is.
        announce: told what is left to do and how long that will take before it is begun, where it
            is more than about a minute's work of one core and is done on this machine.

    Raises:
        RetraceError: anything the user can mend: an unknown method or layer, budgets larger than
            any context, a method that answers with future keys, another run's folder.
    """
    start = time.perf_counter()
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    if skip_damaged:
        trace = without_damaged(trace, choose_layers(trace, layers))
    specs, every = parse_specs(methods)
    if part is not None:
        for spec in specs:
            spec.check_named()
    specs = able_to_learn(trace, specs, every)
    folder = None if out is None else Path(out)
    writing: AbstractContextManager[RetraceError | None] = (
        nullcontext() if folder is None else locked_folder(folder, shared=part is not None)
    )
    with writing as refusal:
        if folder is not None:
            for name in ("plots", PARTS, SAVED):
                within(folder, name)  # refused ahead
            check_files(folder, FILES)
        if folder is not None and overwrite:
            refuse_other_things(folder)
        before = None if folder is None or overwrite else earlier(folder)
        noted = [] if before is None else before.run.get("outdated", [])
        target = choose_device(device)
        settings, wanted, before = settle(
            trace,
            specs,
            topk,
            None if overwrite else folder,
            before,
            protocol,
            min_context,
            layers,
            calibration_sequences,
            again,
        )
        if refusal is not None and (wanted or part is not None):
            raise refusal
        if not wanted:
            assert before is not None and folder is not None
            if refusal is None:
                # What a run that was killed at its very end did not come to.
                finish_saving(folder)
                if before.run["outdated"] != noted:
                    before.save(folder)
                clear_finished(folder, before.run)
            return before
        for spec in specs:
            if not spec.method.charged:
                log.warning(
                    "%s: index not charged. Its bytes are those of the keys and values that it "
                    "attends and nothing else: say what finding them reads by aux_bytes, or by "
                    "holds_keys (True: every key, False: nothing).",
                    spec,
                )
        clock = Clock(target, wait=profile)
        if every:
            _name_missing_libraries()
        work = settings.scores() * len(wanted)
        with start_workers(target, workers, work, executor) as (pool, count):
            if not is_here(pool):
                for spec in specs:
                    spec.check_portable()
            ready = _ready(settings, wanted, every, target, keep_exact, again, clock, pool)
            job = Job(settings, Plan(ready, settings.counting), target)
            kept = None if folder is None else KeptParts(folder, job)
            tasks = job.tasks if part is None else share(job.tasks, *part)
            store = reference_store(trace, keep_exact)
            there = {} if kept is None or again else kept.load_all(tasks)
            if there:
                log.info(
                    "kept: %d of %d layers of sequences of a run that was interrupted",
                    len(there),
                    len(tasks),
                )
            if announce is not None and work >= WORTH_PROCESSES and executor is None:
                left = [at for at in tasks if at not in there]
                with clock.charge("forecast"):
                    announce(forecast(job, left, store, count))
            parts, missing = replay_all(job, tasks, store, clock, pool, there, kept, progress)
        wall, names = time.perf_counter() - start, [str(method.spec) for method in wanted]
        spent = clock.facts(wall, count, names)
        results = tabulate(job, parts, missing, spent)
        if part is not None:
            return results
        if before is not None:
            results = before.merged(results)
        if folder is not None:
            if overwrite:
                _clear_plots(folder)
            results.save(folder)
            clear_finished(folder, results.run)
        return results


def settle(
    trace: Trace,
    specs: list[MethodSpec],
    topk: Sequence[int],
    folder: Path | None,
    before: Results | None,
    protocol: str,
    min_context: int | str | None,
    layers: Sequence[int] | None,
    calibration_sequences: Sequence[int] | None,
    again: bool = False,
) -> tuple[Settings, list[Replayed], Results | None]:
    """What a run into a folder with some results `before` comes to: what all its methods share,
    the methods and budgets that are not there yet, and what is there less what is outdated."""
    settings = Settings(
        trace,
        Counting.asked(protocol, min_context),
        choose_layers(trace, layers),
        _held_out(trace, specs, calibration_sequences, before),
    )
    budgets = _budgets(topk)
    if min_context is not None:
        budgets = settings.countable(budgets)
    elif folder is not None and (begun := _begun(folder, before)) is not None:
        budgets = settings.count_as(begun, budgets, folder)
    else:
        budgets = settings.count_alike(budgets)
    if folder is not None and before is not None:
        settings.check_same(before, folder)
    return settings, *_still_wanted(settings, specs, budgets, before, again)


def _begun(folder: Path, before: Results | None) -> Counting | None:
    """Which queries count in what a folder holds: results, or parts of some."""
    return counting_of_parts(folder) if before is None else Counting.recorded(before.run)


def exact_answers(trace: Location) -> Path | None:
    """The folder, beside a trace on a local disk, where its exact answers are kept."""
    return beside(trace, "exact")


def _budgets(topk: Sequence[int]) -> tuple[int, ...]:
    if not topk or min(topk) < 1:
        raise RetraceError(f"top-k {', '.join(map(str, topk)) or 'missing'}: expected 1 or more.")
    if max(topk) > MOST_KEYS:
        raise RetraceError(f"top-k {max(topk)}: expected at most {MOST_KEYS:,} keys.")
    return tuple(sorted(set(topk)))


def _held_out(
    trace: Trace,
    specs: list[MethodSpec],
    sequences: Sequence[int] | None,
    before: Results | None,
) -> tuple[int, ...]:
    """The sequences that are for calibration."""
    if sequences is None and before is not None:
        sequences = before.run.get("calibration")
    if sequences is None and not any(spec.method.calibrated for spec in specs):
        return ()
    return choose_calibration(trace, sequences)


def earlier(folder: Path) -> Results | None:
    """The results that are in the folder; None where there are at most parts of some."""
    names = _names_in(folder)
    if names <= BEGUN:
        return None
    if not names & OWN:
        raise _other_things(folder)
    try:
        return Results.load(folder)
    except RetraceError as error:
        raise RetraceError(
            f"{error} Choose another with --out, or replace it with --overwrite."
        ) from error


def refuse_other_things(folder: Path) -> None:
    """Refuse to replace what retrace did not write."""
    names = _names_in(folder)
    if not names <= BEGUN and not names & OWN:
        raise _other_things(folder)


def _names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _other_things(folder: Path) -> RetraceError:
    return RetraceError(
        f"{folder} is not empty, and no results folder of retrace: choose another with --out."
    )


def share(tasks: list[tuple[int, int]], index: int, count: int) -> list[tuple[int, int]]:
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
    budgets: tuple[int, ...],
    before: Results | None,
    again: bool,
) -> tuple[list[Replayed], Results | None]:
    """The methods and budgets that are not there yet, and what is there less what is outdated."""
    if before is None:
        return [Replayed(spec, budgets) for spec in specs], None
    asked = {str(spec): spec for spec in specs}
    made = {name: settings.made_by(spec) for name, spec in asked.items()}
    outdated = outdated_among(made, before.run["methods"])
    wanted = []
    for name, spec in asked.items():
        held = set(before.topk(name))
        if again:
            missing = tuple(sorted({*budgets, *held}))
        else:
            there = set() if name in outdated else held - before.incomplete(name)
            missing = tuple(k for k in budgets if k not in there)
        if missing:
            wanted.append(Replayed(spec, missing))
    computed = {(str(method.spec), k) for method in wanted for k in method.topk}
    note_kept(
        (name, k, before.when(name, k))
        for name in asked
        for k in budgets
        if (name, k) not in computed
    )
    before = before.without(asked.keys() if again else outdated)
    before.run["outdated"] = outdated_besides(
        specs, before.run["methods"], settings.made_by, settings.engine
    )
    return wanted, before


def _name_missing_libraries() -> None:
    missing = missing_libraries()
    for command in dict.fromkeys(missing.values()):
        names = ", ".join(name for name in missing if missing[name] == command)
        log.warning("Left out, since a library is missing: %s (%s).", names, command)


def _ready(
    settings: Settings,
    methods: Sequence[Replayed],
    optional: frozenset[str],
    device: torch.device,
    keep: bool,
    again: bool,
    clock: Clock,
    pool: Executor,
) -> tuple[Replayed, ...]:
    """The methods, calibrated and tried before any time is spent. A method that cannot run here is
    left out with a warning if it is optional, and so is one whose bytes are none, where there are
    others."""
    trials = Trials(settings, device)
    ready = []
    for method in methods:
        name = str(method.spec)
        try:
            if method.spec.method.calibrated:
                with clock.charge("calibration", name):
                    method = settings.calibrated(method, device, keep, pool, again)
            with torch.inference_mode(), clock.charge("causality check", name), naming(name):
                trials.check(method)
        except DamageError:
            raise  # of the trace, which no method can be measured on
        except RetraceError as error:
            alone = len(methods) == 1 or not isinstance(error, CostError)
            if name not in optional and alone:
                raise
            log.warning("Left out: %s", error)
        else:
            ready.append(method)
    if not ready:
        raise RetraceError("None of these methods can run on this trace.")
    return tuple(ready)


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


def _clear_plots(folder: Path) -> None:
    """Remove the pictures of earlier results, and nothing else that may lie there."""
    pictures = within(folder, "plots")
    for pattern in PLOTS:
        for plot in pictures.glob(pattern):
            if not plot.is_dir():
                plot.unlink()
