"""Going on with what is whole of a damaged trace."""

import logging

from retrace.traces import RetraceError, Trace, verify_trace

log = logging.getLogger("retrace")


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
