"""`estimate`: what an analysis will read, compute and take, before it is begun."""

from collections.abc import Sequence
from pathlib import Path

from retrace.analyze.arguments import choose_device, choose_layers
from retrace.analyze.commands.analyze import (
    earlier,
    reference_store,
    refuse_other_things,
    settle,
    share,
)
from retrace.analyze.damage import without_damaged
from retrace.analyze.methods.registry import Methods, parse_specs
from retrace.analyze.replay.engine import Plan
from retrace.analyze.replay.forecast import Estimate, forecast
from retrace.analyze.replay.parts import Job, KeptParts
from retrace.analyze.replay.trials import able_to_learn
from retrace.analyze.workers.start import worker_count
from retrace.traces import Location, Trace, open_trace


def estimate(
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
    part: tuple[int, int] | None = None,
    keep_exact: bool = True,
    overwrite: bool = False,
    again: bool = False,
    skip_damaged: bool = False,
) -> Estimate:
    """What `analyze` with the same arguments will take, by `forecast`; nothing is written.

    Raises:
        RetraceError: what `analyze` raises before it begins.
    """
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    if skip_damaged:
        trace = without_damaged(trace, choose_layers(trace, layers))
    specs, every = parse_specs(methods)
    specs = able_to_learn(trace, specs, every)
    folder = None if out is None else Path(out)
    if folder is not None and overwrite:
        refuse_other_things(folder)
    before = None if folder is None or overwrite else earlier(folder)
    target = choose_device(device)
    settings, wanted, _ = settle(
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
    count = worker_count(target, settings.scores() * len(wanted), workers)
    if not wanted:
        return Estimate(0, 0, 0, 0, 0, count, 0.0)
    plan = Plan(tuple(wanted), settings.counting)
    job = Job(settings, plan, target)
    tasks = job.tasks if part is None else share(job.tasks, *part)
    if folder is not None and not again:
        there = KeptParts(folder, job).load_all(tasks)
        tasks = [at for at in tasks if at not in there]
    store = reference_store(trace, keep_exact, create=False)
    return forecast(job, tasks, store, count)
