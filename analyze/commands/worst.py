"""The worst queries of results, looked at in the trace that they are of, where that is here."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from retrace.analyze.arguments import choose_device
from retrace.analyze.commands.show import Texts, TextsOf, find_query, look
from retrace.analyze.methods.specs import recorded_spec
from retrace.analyze.outputs.report.tails import picture_of
from retrace.analyze.replay.counting import Counting
from retrace.analyze.replay.plan import Replayed
from retrace.analyze.replay.settings import Settings
from retrace.analyze.replay.trials import check_answers
from retrace.analyze.results import Results
from retrace.analyze.tables.tails import AT, tails_of_all
from retrace.analyze.workers.start import threads
from retrace.traces import RetraceError, Trace, locate, open_trace

METRIC = "attention_fraction"
"""Whose worst queries are drawn: those that lose most of their attention."""
MOST_PICTURES, MOST_METHODS = 6, 8
LONGEST = 1 << 15
"""Positions of a sequence that is looked into: of a longer one, states take long to build."""
TOLERANCE = 1e-3
"""How far, relatively, a figure may be from the run's, on another device."""


def worst_pictures(results: Results, texts_of: TextsOf | None) -> tuple[list[dict[str, Any]], str]:
    """Pictures of the worst queries, one for each method at its largest budget, and why some or all
    are missing.

    Results are data that anybody may have written: only a trace on a local disk that is theirs is
    read, and no file of code that they name is run.
    """
    tails = tails_of_all(results.tails)
    rows = tails[tails["metric"] == METRIC]
    if rows.empty:
        return [], ""
    try:
        trace, device = _trace_of(results.run), choose_device("auto")
        counting = Counting.recorded(results.run)
    except RetraceError as error:
        return [], str(error)
    texts = None
    with suppress(RetraceError):
        texts = None if texts_of is None else texts_of(trace)
    pictures: list[dict[str, Any]] = []
    missing: list[str] = []
    for of_place in _places(rows):
        if len(pictures) == MOST_PICTURES:
            break
        try:
            pictures.append(_picture(results, trace, counting, of_place, device, texts))
        except RetraceError as error:
            missing.append(str(error))
    return pictures, " ".join(dict.fromkeys(missing))


def _trace_of(run: Mapping[str, Any]) -> Trace:
    """The trace of a run.

    Raises:
        RetraceError: it is not here, or is another one by now.
    """
    named, sequences = run.get("trace_path"), run.get("sequences")
    held_out = run.get("calibration") or []
    place = locate(named) if isinstance(named, str) else None
    if not isinstance(place, Path) or not place.is_dir():
        raise RetraceError("The trace is not on this machine.")
    trace = open_trace(place)
    known = all(
        isinstance(numbers, list) and all(type(s) is int and s in trace.sequences for s in numbers)
        for numbers in (sequences, held_out)
    )
    if not known or [trace.digest(s) for s in sequences or ()] != run.get("trace"):
        raise RetraceError(f"{place} is not the trace of these results.")
    return trace


def _places(rows: Any) -> Iterator[list[dict[str, Any]]]:
    """The rows of each method's largest budget, those of one query and budget together."""
    largest = rows.loc[rows.groupby("method", sort=False)["topk"].idxmax()]
    for _, part in largest.groupby(["topk", *AT], sort=False):
        yield part.to_dict("records")


def _picture(
    results: Results,
    trace: Trace,
    counting: Counting,
    rows: list[dict[str, Any]],
    device: torch.device,
    texts: Texts | None,
) -> dict[str, Any]:
    """The query that is the worst of the methods of these rows, and what others attend there.

    Raises:
        RetraceError: it cannot be looked at, or does not come to what the run found.
    """
    first = rows[0]
    layer, head, sequence, position = (int(first[name]) for name in AT)
    held_out = tuple(results.run.get("calibration") or ())
    settings = Settings(trace, counting, (trace.layer(layer).index,), held_out)
    place = find_query(settings, layer, head, sequence, position)
    if trace.length(sequence) > LONGEST:
        raise RetraceError(f"Sequence {sequence} is longer than {LONGEST:,} positions.")
    own = [str(row["method"]) for row in rows]
    k = int(first["topk"])
    ready = [_ready(settings, results, method, k, device) for method in own]
    others = [m for m in results.methods() if m not in own and k in results.topk(m)]
    for method in others[: max(0, MOST_METHODS - len(own))]:
        with suppress(RetraceError):
            ready.append(_ready(settings, results, method, k, device))
    query = look(settings, ready, device, place, texts)
    found = query.figures.set_index("method")[METRIC]
    for row in rows:
        if abs(found[row["method"]] - row["worst"]) > TOLERANCE * row["worst"] + 1e-6:
            raise RetraceError(
                f"{row['method']} attends to other keys here than in its run: its code is another."
            )
    return picture_of(query, f"{', '.join(own)}, top-k {k}: the query of least attention fraction")


def _ready(
    settings: Settings, results: Results, method: str, k: int, device: torch.device
) -> Replayed:
    """A method of the results at a budget, with what it learnt.

    Raises:
        RetraceError: it cannot be run from what the results say of it.
    """
    if results.run["methods"].get(method, {}).get("given"):
        raise RetraceError(f"{method} was given as an object of Python.")
    spec = recorded_spec(method, ())
    protocol = settings.counting.protocol
    check_answers(spec, protocol)
    replayed = Replayed(spec, (k,), protocol=protocol)
    if not spec.method.calibrated:
        return replayed
    if not settings.calibration:
        raise RetraceError(f"{method} learnt from a file, which results do not hold.")
    with threads(device, 1) as pool:
        return settings.calibrated(replayed, device, True, pool)
