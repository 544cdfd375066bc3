"""`calibrate`: let methods learn what they need, ahead of replaying them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Unpack

from retrace.analyze.arguments import (
    choose_calibration,
    choose_device,
    choose_layers,
    choose_to_learn,
)
from retrace.analyze.methods.specs import Methods, parse_specs
from retrace.analyze.options import WorkOptions, with_defaults
from retrace.analyze.replay.calibration import (
    calibration,
    calibration_name,
    calibrations,
    keep_learned,
)
from retrace.analyze.replay.calibration_file import write_calibration
from retrace.analyze.workers.retry import finished
from retrace.analyze.workers.start import is_here, start_workers
from retrace.traces import Location, RetraceError, Trace, open_trace
from retrace.traces.progress import ShowDone


def calibrate(
    trace: Trace | str | Location,
    method: Methods,
    sequences: Sequence[int] | None = None,
    *,
    out: str | Path | None = None,
    again: bool = False,
    progress: ShowDone | None = None,
    **options: Unpack[WorkOptions],
) -> list[Path]:
    """Calibrate a method, and keep what it learns beside the trace for `analyze` to find.

    Args:
        trace: a trace or where it is, on a local disk.
        method: a method spec, such as `loki`, or several with values in braces, and whatever else
            `analyze` takes for methods.
        sequences: those to learn from; by default the last quarter of the trace's, as `analyze`
            holds them out, or with `out` the last, at most 8.
        out: one file of all layers, which `calibration_from` of `analyze` takes on other traces of
            the same model; every sequence may be learnt from.
        again: learn anew what is kept, though nothing that it depends on is known to have changed:
            for what nobody sees, such as files that a method reads and does not name in `reads`.
        progress: told how many layers of methods are done, and of how many.
        options: `retrace.analyze.options.WorkOptions` says what each is.

    Returns:
        The files, one per method and layer, or one per method where it learns of all layers
        together, each an .npz of arrays named `<kv head>.<name>`. Those that are there already are
        not computed again, unless with `again`. With `out` that file alone.

    Raises:
        RetraceError: the method needs no calibration, or the trace has too few sequences.
    """
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    specs, _ = parse_specs(method)
    for spec in specs:
        if not spec.method.calibrated:
            raise RetraceError(f"{spec} needs no calibration.")
    if out is not None and len(specs) > 1:
        raise RetraceError(f"{out} is for one method, and here are {len(specs)}: name one.")
    folder = calibrations(trace)
    if folder is None and out is None:
        raise RetraceError(
            f"{trace.path} is not on a local disk, where calibrations are kept: `retrace analyze` "
            "calibrates as it goes."
        )
    chosen = (choose_calibration if out is None else choose_to_learn)(trace, sequences)
    given = with_defaults(options, WorkOptions)
    indices, target = choose_layers(trace, given["layers"]), choose_device(given["device"])
    # Methods that differ only in how they select share their files.
    calls = {
        (folder or Path()) / calibration_name(trace, spec, chosen, layer): partial(
            keep_learned, trace, spec, chosen, layer, target, True, again
        )
        for spec in specs
        for layer in (trace.layers[:1] if spec.method.learns == "model" else indices)
    }
    show = progress or (lambda *_: None)
    if folder is None or (out is not None and specs[0].code.digest is None):
        calls = {}  # nothing is kept that `out` could be made from
    show(0, len(calls))
    with start_workers(target, given["workers"], 0.0, given["executor"]) as (pool, _):
        if not is_here(pool):
            for spec in specs:
                spec.check_portable()
        for done, (_, death) in enumerate(finished(pool, calls), start=1):
            if death is not None:
                raise death
            show(done, len(calls))
        if out is not None:
            # From what was kept just now, where that is possible.
            learnt = calibration(trace, specs[0], chosen, indices, target, True, pool)
            write_calibration(Path(out), trace, specs[0], chosen, learnt)
            return [Path(out)]
    return list(calls)
