"""Whether errors can be told after the output projection: where a trace holds it."""

import logging

from retrace.analyze.replay.settings import Settings
from retrace.traces import RetraceError

log = logging.getLogger("retrace")


def check_projected(settings: Settings) -> None:
    """Refuse projected errors of layers of which none has its output projection in the trace; a
    warning names layers that lack it where others have it.

    Raises:
        RetraceError: none has.
    """
    trace = settings.trace
    lacking = [i for i in settings.layers if not trace.layer(i).has_output_projection]
    if not lacking:
        return
    why = trace.layer(lacking[0]).attributes.get("no_output_projection")
    cause = f"{why}" if isinstance(why, str) else "an earlier capture kept none"
    if len(lacking) == len(settings.layers):
        raise RetraceError(
            f"--projected takes the output projections of layers, and {trace.path} has none of "
            f"these (layer {lacking[0]}: {cause}): leave --projected out, or capture anew."
        )
    log.warning(
        "No projected errors of layer %s, whose output projection is not in the trace (%s).",
        ", ".join(map(str, lacking)),
        cause,
    )
