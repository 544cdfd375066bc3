"""`analyze`: replay methods against a trace and keep what they come to."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Unpack

import torch

from retrace.analyze.commands.setup import Asked, Settled, reference_store, settle, share
from retrace.analyze.methods.hooks import naming
from retrace.analyze.methods.registry import missing_libraries
from retrace.analyze.methods.specs import Methods, MethodSpec
from retrace.analyze.options import RunOptions, with_defaults
from retrace.analyze.replay.clock import Clock
from retrace.analyze.replay.forecast import Estimate, forecast
from retrace.analyze.replay.parts import PARTS, Job, KeptParts, clear_finished
from retrace.analyze.replay.plan import Replayed, names_of
from retrace.analyze.replay.tasks import replay_all
from retrace.analyze.replay.trials import Trials
from retrace.analyze.results import Results
from retrace.analyze.selection.charges import CostError
from retrace.analyze.tables.build import tabulate
from retrace.analyze.tables.saved import SAVED, finish_saving
from retrace.analyze.workers.start import WORTH_PROCESSES, is_here, start_workers
from retrace.traces import DamageError, Location, RetraceError, Trace
from retrace.traces.progress import ShowDone
from retrace.traces.storage.durable import within
from retrace.traces.storage.lock import check_files, locked_folder

log = logging.getLogger("retrace")


def analyze(
    trace: Trace | str | Location,
    methods: Methods = ("exact",),
    topk: Sequence[int] = (10,),
    *,
    profile: bool = False,
    progress: ShowDone | None = None,
    announce: Callable[[Estimate], None] | None = None,
    **options: Unpack[RunOptions],
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
        profile: wait for a GPU after every step, so that `Results.profile` tells what each takes;
            without a GPU it does so anyway.
        progress: told how far it is.
        announce: told what is left to do and how long that will take before it is begun, where it
            is more than about a minute's work of one core and is done on this machine.
        options: `retrace.analyze.options.RunOptions` says what each is.

    Returns:
        The results, those that the folder held before among them; of a `part` its own alone.

    Raises:
        RetraceError: anything the user can mend: an unknown method or layer, budgets larger than
            any context, a method that answers with future keys, another run's folder.
    """
    start = time.perf_counter()
    chosen = with_defaults(options, RunOptions)
    asked = Asked.of(trace, methods, topk, chosen)
    folder, part = asked.folder, chosen["part"]
    writing: AbstractContextManager[RetraceError | None] = (
        nullcontext() if folder is None else locked_folder(folder, shared=part is not None)
    )
    with writing as refusal:
        if folder is not None:
            for name in ("plots", PARTS, SAVED):
                within(folder, name)  # refused ahead
            check_files(folder, Results.files())
        settled = settle(asked)
        settings, wanted, before = settled.settings, settled.wanted, settled.before
        if refusal is not None and (wanted or part is not None):
            raise refusal
        if not wanted:
            assert before is not None and folder is not None
            if refusal is None:
                # What a run that was killed at its very end did not come to.
                finish_saving(folder)
                if before.run["outdated"] != settled.noted:
                    before.save(folder)
                clear_finished(folder, before.run)
            return before
        _name_uncharged(asked.specs)
        if asked.optional:
            _name_missing_libraries()
        clock = Clock(settled.device, wait=profile)
        work = settings.scores() * len(wanted)
        executor = chosen["executor"]
        with start_workers(settled.device, chosen["workers"], work, executor) as (pool, count):
            if not is_here(pool):
                for spec in asked.specs:
                    spec.check_portable()
            ready = ready_methods(asked, settled, clock, pool)
            job = Job(settings, ready, settled.device, chosen["locality"], chosen["projected"])
            kept = None if folder is None else KeptParts(folder, job)
            tasks = job.tasks if part is None else share(job.tasks, *part)
            store = reference_store(asked.trace, chosen["keep_exact"])
            there = {} if kept is None or chosen["again"] else kept.load_all(tasks)
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
        wall = time.perf_counter() - start
        spent = clock.facts(wall, count, names_of(wanted))
        results = Results(**vars(tabulate(job, parts, missing, spent)))
        if part is not None:
            return results
        if before is not None:
            results = before.merged(results)
        if folder is not None:
            if chosen["overwrite"]:
                _clear_plots(folder)
            results.save(folder)
            clear_finished(folder, results.run)
        return results


def _name_uncharged(specs: Sequence[MethodSpec]) -> None:
    for spec in dict.fromkeys(one for asked in specs for one in asked.each):
        if not spec.method.charged:
            log.warning(
                "%s: index not charged. Its bytes are those of the keys and values that it "
                "attends and nothing else: say what finding them reads by aux_bytes, or by "
                "holds_keys (True: every key, False: nothing).",
                spec,
            )


def _name_missing_libraries() -> None:
    missing = missing_libraries()
    for command in dict.fromkeys(missing.values()):
        names = ", ".join(name for name in missing if missing[name] == command)
        log.warning("Left out, since a library is missing: %s (%s).", names, command)


def ready_methods(
    asked: Asked, settled: Settled, clock: Clock, pool: Executor
) -> tuple[Replayed, ...]:
    """The methods, calibrated and tried before any time is spent. A method that cannot run here is
    left out with a warning if it is optional, and so is one whose bytes are none, where there are
    others."""
    settings, device, options = settled.settings, settled.device, asked.options
    trials = Trials(settings, device)
    ready = []
    for method in settled.wanted:
        name = str(method.spec)
        try:
            if method.spec.method.calibrated:
                with clock.charge("calibration", name):
                    method = settings.calibrated(
                        method, device, options["keep_exact"], pool, options["again"]
                    )
            with torch.inference_mode(), clock.charge("causality check", name), naming(name):
                trials.check(method)
        except DamageError:
            raise  # of the trace, which no method can be measured on
        except RetraceError as error:
            alone = len(settled.wanted) == 1 or not isinstance(error, CostError)
            if name not in asked.optional and alone:
                raise
            log.warning("Left out: %s", error)
        else:
            ready.append(method)
    if not ready:
        raise RetraceError("None of these methods can run on this trace.")
    return tuple(ready)


def _clear_plots(folder: Path) -> None:
    """Remove the pictures of earlier results, and nothing else that may lie there."""
    from retrace.analyze.outputs.plots.files import remove_picture  # draws: not wanted before
    from retrace.analyze.outputs.plots.results import PLOTS

    pictures = within(folder, "plots")
    for pattern in PLOTS:
        remove_picture(pictures, pattern)
