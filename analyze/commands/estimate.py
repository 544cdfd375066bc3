"""`estimate`: what an analysis will read, compute and take, before it is begun."""

from collections.abc import Sequence
from typing import Unpack

from retrace.analyze.commands.setup import Asked, reference_store, settle, share
from retrace.analyze.methods.specs import Methods
from retrace.analyze.options import RunOptions, with_defaults
from retrace.analyze.replay.forecast import Estimate, forecast
from retrace.analyze.replay.parts import Job, KeptParts
from retrace.analyze.workers.start import worker_count
from retrace.traces import Location, RetraceError, Trace


def estimate(
    trace: Trace | str | Location,
    methods: Methods = ("exact",),
    topk: Sequence[int] = (10,),
    **options: Unpack[RunOptions],
) -> Estimate:
    """What `analyze` with the same arguments will take, by `forecast`; nothing is written.

    Raises:
        RetraceError: what `analyze` raises before it begins, or another machine is to do the work.
    """
    chosen = with_defaults(options, RunOptions)
    if chosen["executor"] is not None:
        raise RetraceError("What a cluster takes is not known here: leave out the executor.")
    asked = Asked.of(trace, methods, topk, chosen)
    settled = settle(asked)
    settings, wanted = settled.settings, settled.wanted
    count = worker_count(settled.device, settings.scores() * len(wanted), chosen["workers"])
    if not wanted:
        return Estimate(0, 0, 0, 0, 0, count, 0.0)
    job = Job(settings, tuple(wanted), settled.device, chosen["locality"], chosen["projected"])
    part, folder = chosen["part"], asked.folder
    tasks = job.tasks if part is None else share(job.tasks, *part)
    if folder is not None and not chosen["again"]:
        there = KeptParts(folder, job).load_all(tasks)
        tasks = [at for at in tasks if at not in there]
    return forecast(job, tasks, reference_store(asked.trace, chosen["keep_exact"], False), count)
