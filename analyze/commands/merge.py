"""`merge`: the parts of a run that was shared out, put together."""

from collections.abc import Sequence
from pathlib import Path

from retrace.analyze.commands.setup import earlier
from retrace.analyze.replay.clock import Clock
from retrace.analyze.replay.parts import KeptParts, Part, finished_runs
from retrace.analyze.replay.plan import names_of
from retrace.analyze.results import Results
from retrace.analyze.storage.journal import Task
from retrace.analyze.tables.build import tabulate
from retrace.analyze.tables.saved import SAVED
from retrace.traces import RetraceError
from retrace.traces.storage.durable import within
from retrace.traces.storage.lock import check_files, locked_folder


def merge(folders: Sequence[str | Path], *, methods: Sequence[str] = ()) -> Results:
    """Results of parts that `analyze(..., part=(i, n))` left in some folders, as one run's.

    They are written into the first folder, beside those that it holds, and the parts are removed.

    Args:
        folders: results folders.
        methods: specs of methods in loose files, such as `./mine.py:Mine`, that the parts are of:
            a file is run only where it is named here.

    Raises:
        RetraceError: there are no parts, some are missing, or those of one run were judged on other
            queries than those of another.
    """
    places = [Path(folder) for folder in folders]
    with locked_folder(places[0]) as refusal:
        if refusal is not None:
            raise refusal
        return _merged(places, methods)


def _merged(places: Sequence[Path], methods: Sequence[str]) -> Results:
    runs: dict[str, list[KeptParts]] = {}
    for place in places:
        for kept in KeptParts.all_in(place, methods):
            runs.setdefault(kept.job.digest, []).append(kept)
    if not runs:
        raise RetraceError(
            f"{', '.join(map(str, places))} holds no parts: `retrace analyze --part` makes them."
        )
    for name in ("plots", SAVED):
        within(places[0], name)  # refused ahead
    check_files(places[0], Results.files())
    results = earlier(places[0])
    # Of a merge that was killed when it had saved, some parts may be gone already.
    saved = set() if results is None else finished_runs(results.run)
    missing = [kept for digest, kept in runs.items() if digest not in saved]
    for parts in missing:
        if results is not None:
            parts[0].job.settings.check_same(results.run, places[0])
        newer = _whole(parts)
        results = newer if results is None else results.merged(newer)
    assert results is not None
    if missing:
        results.save(places[0])
    for everywhere in runs.values():
        for kept in everywhere:
            kept.clear()
    return results


def _whole(everywhere: Sequence[KeptParts]) -> Results:
    """The results of one run, whose parts are in some folders."""
    job = everywhere[0].job
    found: dict[Task, Part] = {}
    for kept in everywhere:
        found = kept.load_all(job.tasks) | found
    parts = {at: found[at] for at in job.tasks if at in found}
    if len(parts) < len(job.tasks):
        raise RetraceError(_what_is_missing([at for at in job.tasks if at not in parts], job.tasks))
    clock = Clock(job.device)
    for part in parts.values():
        clock.add(part.clock)
    # Nobody knows how long it would have taken in one go: as long as the work itself.
    spent = clock.facts(sum(clock.seconds.values()), 1, names_of(job.plan.methods))
    return Results(**vars(tabulate(job, {at: p.tallies for at, p in parts.items()}, {}, spent)))


def _what_is_missing(missing: list[Task], tasks: list[Task]) -> str:
    layers: dict[int, list[str]] = {}
    for layer, sequence in missing:
        layers.setdefault(sequence, []).append(str(layer))
    places = (f"layer {','.join(these)} of sequence {s}" for s, these in layers.items())
    return (
        f"{len(missing)} of {len(tasks)} parts are missing ({'; '.join(places)}): run `retrace "
        "analyze --part` again where it did not finish; it goes on from there."
    )
