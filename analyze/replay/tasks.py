"""The tasks of a run: one per layer and sequence, replayed wherever there is a worker."""

from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import dataclass, replace
from functools import partial

import torch

from retrace.analyze.exact.store import ReferenceStore
from retrace.analyze.replay.clock import Clock
from retrace.analyze.replay.engine import replay
from retrace.analyze.replay.parts import Job, KeptParts, Part
from retrace.analyze.replay.plan import Plan
from retrace.analyze.replay.tally import Tally
from retrace.analyze.storage.journal import Task
from retrace.analyze.workers.retry import finished, name_missing, none_left
from retrace.traces import Trace
from retrace.traces.progress import ShowDone


@dataclass(frozen=True)
class Replayer:
    """All that any worker needs, wherever it is, to replay a task."""

    trace: Trace
    device: torch.device
    store: ReferenceStore
    clock: Clock

    def part(self, layer: int, sequence: int, plan: Plan) -> Part:
        """What the methods of the plan come to there."""
        spent = self.clock.another()
        with torch.inference_mode():
            tallies = replay(self.trace, layer, sequence, plan, self.device, self.store, spent)
        return Part(tallies, spent)


def replay_all(
    job: Job,
    tasks: Sequence[Task],
    store: ReferenceStore,
    clock: Clock,
    pool: Executor,
    there: Mapping[Task, Part],
    kept: KeptParts | None,
    progress: ShowDone | None,
) -> tuple[dict[Task, list[Tally]], dict[Task, str]]:
    """Every method's tally for each of some tasks, in their order, and what ended the workers of
    those that are missing.

    Parts that are `there` are not replayed again, and those that are finished are kept at once.
    """
    replayer = Replayer(job.settings.trace, job.device, store, clock.another())
    parts = {at: part.tallies for at, part in there.items()}
    missing: dict[Task, str] = {}
    if kept is not None:
        kept.begin()
    calls = {
        at: partial(replayer.part, *at, _of_layer(job.plan, at[0]))
        for at in tasks
        if at not in parts
    }

    def show() -> None:
        if progress is not None:
            progress(len(parts) + len(missing), len(tasks))

    show()
    for at, answer in finished(pool, calls):
        if isinstance(answer, BrokenExecutor):
            missing[at] = str(answer)
            name_missing(*at, answer)
        else:
            parts[at] = answer.tallies
            clock.add(answer.clock)
            if kept is not None:
                kept.save(at, answer)
        show()
    if kept is not None:
        kept.flush()
    if not parts:
        raise none_left(missing.values())
    return {at: parts[at] for at in tasks if at in parts}, missing


def _of_layer(plan: Plan, layer: int) -> Plan:
    """The plan without what methods learned of other layers."""
    return replace(plan, methods=tuple(method.of_layer(layer) for method in plan.methods))
