"""What a run works on: which device, layers and sequences."""

import logging
from collections.abc import Sequence

import torch

from retrace.traces import RetraceError, Trace, verify_trace

log = logging.getLogger("retrace")

MOST_CALIBRATION = 8
"""Most sequences that are held out for calibration unless they are named."""


def choose_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N`; `auto` is cuda where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RetraceError(f"Unknown device {name!r}: expected cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RetraceError("CUDA is asked for, but no CUDA device is here: use --device cpu.")
    if device.type not in ("cpu", "cuda"):
        raise RetraceError(f"The device {name!r} is not supported: use cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RetraceError(
            f"There is no device {name!r}: PyTorch finds {torch.cuda.device_count()}, from cuda:0."
        )
    return device


def choose_layers(trace: Trace, layers: Sequence[int] | None) -> tuple[int, ...]:
    """These layers of the trace in order; all recorded ones if None."""
    if layers is None:
        return trace.layers
    return tuple(trace.layer(i).index for i in sorted(set(layers)))


def scores(trace: Trace, layers: Sequence[int], sequences: Sequence[int]) -> int:
    """How many exact scores the queries of these layers and sequences have."""
    heads = sum(trace.layer(i).rules.heads for i in layers)
    return heads * sum(len(trace.query_positions(s)) * trace.length(s) for s in sequences)


def choose_to_learn(trace: Trace, sequences: Sequence[int] | None) -> tuple[int, ...]:
    """The sequences that are learnt from where none of the trace is evaluated: these, or the last,
    at most `MOST_CALIBRATION`."""
    if sequences is None:
        return trace.sequences[-MOST_CALIBRATION:]
    return _some_of(trace, sequences)


def choose_calibration(trace: Trace, sequences: Sequence[int] | None) -> tuple[int, ...]:
    """The sequences that methods are calibrated on, of which none is evaluated on: these, or the
    last quarter of the trace's, at least one and at most `MOST_CALIBRATION`."""
    there = trace.sequences
    if len(there) < 2:
        raise RetraceError(
            f"Calibration takes sequences that are not evaluated, and {trace.path} has only "
            f"{len(there)} finished: capture more."
        )
    if sequences is None:
        return there[-min(MOST_CALIBRATION, max(1, len(there) // 4)) :]
    chosen = _some_of(trace, sequences)
    if len(chosen) == len(there):
        raise RetraceError("Every sequence is for calibration: leave at least one to evaluate.")
    return chosen


def _some_of(trace: Trace, sequences: Sequence[int]) -> tuple[int, ...]:
    chosen, there = tuple(sorted(set(sequences))), trace.sequences
    missing = [s for s in chosen if s not in there]
    if missing or not chosen:
        raise RetraceError(
            f"Calibration sequences {', '.join(map(str, missing)) or 'missing'}: expected some of "
            f"the trace's, {', '.join(map(str, there))}."
        )
    return chosen


def without_damaged(trace: Trace, layers: tuple[int, ...]) -> Trace:
    """The trace less the sequences of which something is damaged in these layers, each named in a
    warning.

    Raises:
        RetraceError: no sequence is whole.
    """
    found = verify_trace(trace, layers=layers)
    causes = found.causes()
    if found.damages and not found.whole_sequences:
        raise RetraceError(
            f"No sequence of {trace.path} is whole in these layers, first for "
            f"{found.damages[0].what} ({found.damages[0].cause}): `retrace verify {trace.path}` "
            "tells which layers are; choose among them with --layers."
        )
    for sequence, cause in causes.items():
        log.warning("Sequence %d is left out, since it is damaged: %s.", sequence, cause)
    return trace.without(causes)
