"""What the functions of analysis can be told, with the defaults that all of them share.

The command line's options are made from these classes: each field's docstring is an option's help.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypedDict

from retrace.traces.errors import did_you_mean


class WorkOptions(TypedDict, total=False):
    """What is worked on, and who does it."""

    layers: Sequence[int] | None
    """Layers of the trace; all recorded ones by default."""
    device: str
    """cpu, cuda or cuda:N; auto is cuda where there is one, else cpu."""
    workers: int | None
    """Processes that share the work; figures are the same for any number. By default one per core,
    threads instead where cores are fewer than 4 or the work is short; on a machine with several
    GPUs one for each, or one where the work is short."""
    executor: Executor | str | None
    """What does the work instead: the address of a Dask scheduler, such as tcp://10.0.0.1:8786,
    whose workers find the trace under the same path or URL and have this version of retrace; in
    Python also any executor of concurrent.futures or of its kind."""


class AnalysisOptions(WorkOptions, total=False):
    """How methods are replayed."""

    protocol: str
    """Which queries are answered, from what state: all, all:R (fitted states are rebuilt every R
    positions), prefix:P (state built at P, queries from there on), decode:R:from=P (as prefix:P,
    and methods that evict drop keys at every R-th position since) or prefill:B (blocks of B queries
    share their keys; prefill:B:chunk=C where prompts are read C queries at a time)."""
    min_context: int | str | None
    """First position whose query counts, for all budgets alike: 10 times the largest by default, or
    what the results in the folder began with; `each` counts from 10 k on for budget k, and each
    budget then has queries of its own."""
    calibration_sequences: Sequence[int] | None
    """Sequences that methods are calibrated on, and none is evaluated on; by default those of the
    results in the folder, or the last quarter, if a method needs calibration."""
    calibration_from: str | Path | None
    """File that `retrace calibrate --out` wrote, of a method that learns: of another trace of the
    same model. No sequence of this one is then held out."""
    keep_exact: bool
    """Keep the exact answers, and what methods learn, beside a trace on a local disk: they are
    then computed once, however often it is analyzed."""


class ShowOptions(TypedDict, total=False):
    """How methods are asked for a single query; each is one of `AnalysisOptions`."""

    device: str
    protocol: str
    calibration_sequences: Sequence[int] | None
    calibration_from: str | Path | None
    keep_exact: bool


class RunOptions(AnalysisOptions, total=False):
    """What becomes of the results, and how far a run goes."""

    out: str | Path | None
    """Folder for the results: on the command line results/<trace> by default, in Python none, which
    keeps them in memory. What it holds already is not computed again, unless the code that it comes
    from changed; each layer of a sequence is kept once it is finished."""
    part: tuple[int, int] | None
    """Do only the I-th of N parts of the work, as jobs of a batch system do, and keep it in the
    folder; `merge` puts the parts together."""
    overwrite: bool
    """Throw away the results that the folder holds."""
    again: bool
    """Compute the methods named again at all budgets that the folder holds of them, and what they
    learn, though nothing that they depend on is known to have changed."""
    locality: bool
    """Follow how the keys of each method move from query to query: how many come again, which of
    them a buffer of the keys read last holds, and what crosses the link to a cache that is kept
    elsewhere."""
    where: str | None
    """Count only the queries at positions of this phase (context, continuation, generated) or of
    this mark of the trace, such as answer; sequences without any are left out. Methods see all
    queries as before."""
    evidence: str | None
    """Mark, or phase, whose keys the figures `evidence_recall` and `evidence_mass` are of; by
    default `evidence`, where the trace has it."""
    projected: bool
    """Tell errors after the output projection W_o too, of all heads of a layer together, where the
    trace holds it. It takes the memory of all kv heads of a layer at once."""
    skip_damaged: bool
    """Read all of the trace first, and leave out the sequences of which something is damaged in
    these layers; otherwise damage ends the run."""


DEFAULTS: RunOptions = {
    "layers": None,
    "device": "auto",
    "workers": None,
    "executor": None,
    "protocol": "all",
    "min_context": None,
    "calibration_sequences": None,
    "calibration_from": None,
    "keep_exact": True,
    "out": None,
    "part": None,
    "overwrite": False,
    "again": False,
    "locality": False,
    "where": None,
    "evidence": None,
    "projected": False,
    "skip_damaged": False,
}


def with_defaults(given: Mapping[str, Any], kind: Any) -> RunOptions:
    """The options of one of the classes above, the given ones among them.

    Raises:
        TypeError: there is none of such a name.
    """
    known = kind.__annotations__
    for name in given:
        if name not in known:
            raise TypeError(f"There is no option {name!r}.{did_you_mean(name, known)}")
    options: Any = {**DEFAULTS, **given}
    chosen: RunOptions = options
    return chosen
