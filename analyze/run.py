"""`analyze`: replay methods against a trace and keep what they come to."""

import hashlib
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from retrace.analyze.calibration import calibration, calibration_name
from retrace.analyze.causality import check_causality
from retrace.analyze.methods.registry import MethodSpec, parse_spec
from retrace.analyze.moments import Moments
from retrace.analyze.reference import ReferenceStore
from retrace.analyze.replay import Clock, Plan, Replayed, Tally, replay
from retrace.analyze.results import COLUMNS, PLOTS, Results
from retrace.analyze.scope import choose_calibration, choose_device, choose_layers
from retrace.analyze.states import Cost, Protocol
from retrace.analyze.unit import load_units
from retrace.traces import Location, RemoteLocation, RetraceError, Trace, open_trace

log = logging.getLogger("retrace")

Progress = Callable[[int, int], None]
"""Told how many units of work (one layer of one sequence) are done, and of how many."""


def analyze(
    trace: Trace | str | Location,
    methods: Sequence[str] = ("exact",),
    topk: Sequence[int] = (10,),
    *,
    out: str | Path | None = None,
    protocol: str = "all",
    min_context: int | None = None,
    layers: Sequence[int] | None = None,
    calibration_sequences: Sequence[int] | None = None,
    device: str = "auto",
    keep_exact: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Results:
    """Replay methods against a trace, without its model.

    Args:
        trace: a trace or where it is: a path or a URL.
        methods: method specs, such as `quest:page=32` or `./mine.py:Mine`.
        topk: budgets: keys per query and head.
        out: folder for the results. What is there already for this trace and these settings is
            kept and not computed again. None keeps the results in memory only.
        protocol: `all`, `all:R`, `prefix:P`; see `retrace.analyze.states.Protocol`.
        min_context: the first position that counts; 10 k for budget k if None.
        layers: indices of the layers to replay; all recorded ones if None.
        calibration_sequences: sequences that methods are calibrated on, and that no method of the
            run is evaluated on. By default those of the results that `out` holds; if there are
            none, the last quarter of the trace's if a method needs calibration, else none.
        device: `cpu`, `cuda` or `cuda:N`; `auto` is cuda where there is one, else cpu.
        keep_exact: keep the exact answers, and what methods learn, beside a trace on a local disk,
            so that they are computed once however often it is analyzed.
        overwrite: throw away what is in `out`.
        progress: told how far it is.

    Raises:
        RetraceError: anything the user can mend: an unknown method or layer, a budget larger than
            any context, a method that answers with future keys, another run's folder.
    """
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    specs = _unique([parse_spec(text) for text in methods])
    budgets = _budgets(topk)
    folder = None if out is None else Path(out)
    before = None if folder is None or overwrite else _earlier(folder)
    settings = _Settings(
        trace,
        Protocol.parse(protocol),
        min_context,
        choose_layers(trace, layers),
        _held_out(trace, specs, calibration_sequences, before),
    )
    settings.check_budgets(budgets)
    target = choose_device(device)
    if folder is not None and before is not None:
        settings.check_same(before, folder)
    wanted, before = _still_wanted(specs, budgets, before)
    if not wanted:
        assert before is not None
        return before
    clock = Clock()
    with clock.charge("calibration"):
        wanted = [settings.calibrated(method, target, keep_exact) for method in wanted]
    plan = Plan(tuple(wanted), settings.protocol, min_context)
    tallies = _replay_all(settings, plan, target, _store(trace, keep_exact), clock, progress)
    results = _results(settings, plan, tallies, clock, target)
    if before is not None:
        results = before.merged(results)
    if folder is not None:
        if overwrite and folder.exists():
            _clear(folder)
        results.save(folder)
    return results


def exact_answers(trace: Path) -> Path:
    """The folder, beside a trace, where its exact answers are kept for later runs."""
    return trace.with_name(f"{trace.stem}.exact")


class _Settings:
    """The part of a run that all methods share: what is replayed and what counts."""

    def __init__(
        self,
        trace: Trace,
        protocol: Protocol,
        min_context: int | None,
        layers: tuple[int, ...],
        calibration: tuple[int, ...],
    ) -> None:
        if min_context is not None and min_context < 0:
            raise RetraceError(f"min_context {min_context}: expected a position, 0 or more.")
        if not trace.sequences:
            raise RetraceError(
                f"{trace.path} has no finished sequence. Go on with the capture: "
                "`retrace capture ... --resume`."
            )
        if len(trace.sequences) < trace.planned:
            log.warning(
                "%s is not complete: %d of %d sequences are finished, and only those are analyzed.",
                trace.path,
                len(trace.sequences),
                trace.planned,
            )
        self.trace = trace
        self.protocol = protocol
        self.min_context = min_context
        self.layers = layers
        self.calibration = calibration
        self.sequences = tuple(s for s in trace.sequences if s not in calibration)

    def check_budgets(self, budgets: Sequence[int]) -> None:
        """Refuse budgets for which no query counts."""
        lengths = {s: self.trace.length(s) for s in self.sequences}
        last = {s: int(self.trace.query_positions(s)[-1]) for s in lengths}
        plan = Plan((), self.protocol, self.min_context)
        for k in budgets:
            if all(last[s] < plan.first_counted(k, lengths[s]) for s in lengths):
                needed = min(plan.first_counted(k, n) for n in lengths.values())
                raise RetraceError(
                    f"No query counts for top-k {k}: it takes a position of at least {needed}, "
                    f"and the longest sequence ends at {max(last.values())}. Choose a smaller "
                    "top-k, or lower the least position with --min-context."
                )

    def facts(self) -> dict[str, Any]:
        """What must be equal for results to stand in one folder."""
        return {
            "trace": [self.trace.digest(s) for s in self.sequences],
            "protocol": str(self.protocol),
            "min_context": self.min_context,
            "layers": list(self.layers),
            "calibration": list(self.calibration) or None,
        }

    def check_same(self, before: Results, folder: Path) -> None:
        """Refuse to add to results of other facts."""
        different = [name for name, value in self.facts().items() if before.run.get(name) != value]
        if "calibration" in different:
            raise RetraceError(
                f"{folder} holds results over other sequences than these, less those for "
                "calibration: choose another folder with --out, or replace it with --overwrite."
            )
        if different:
            raise RetraceError(
                f"{folder} holds results of another {' and '.join(different)}: choose another "
                "folder with --out, or replace it with --overwrite."
            )

    def calibrated(self, method: Replayed, device: torch.device, keep: bool) -> Replayed:
        """The method with what it learns of every layer."""
        given = calibration(self.trace, method.spec, self.calibration, self.layers, device, keep)
        return replace(method, calibration=given)

    def calibration_digest(self, spec: MethodSpec) -> str | None:
        """Names what a method learnt, and from what."""
        if not spec.method.calibrated:
            return None
        names = [calibration_name(self.trace, spec, self.calibration, i) for i in self.layers]
        return hashlib.sha256("".join(names).encode()).hexdigest()[:32]


def _unique(specs: list[MethodSpec]) -> list[MethodSpec]:
    if not specs:
        raise RetraceError("No method is named; `retrace methods` lists them.")
    unique: dict[str, MethodSpec] = {}
    for spec in specs:
        if unique.setdefault(str(spec), spec).source_digest != spec.source_digest:
            raise RetraceError(f"Two different files have a method {spec}: rename one of them.")
    return list(unique.values())


def _budgets(topk: Sequence[int]) -> tuple[int, ...]:
    if not topk or min(topk) < 1:
        raise RetraceError(f"top-k {', '.join(map(str, topk)) or 'missing'}: expected 1 or more.")
    return tuple(sorted(set(topk)))


def _held_out(
    trace: Trace,
    specs: list[MethodSpec],
    sequences: Sequence[int] | None,
    before: Results | None,
) -> tuple[int, ...]:
    """The sequences that are for calibration."""
    if sequences is None and before is not None:
        sequences = before.run.get("calibration")
    if sequences is None and not any(spec.method.calibrated for spec in specs):
        return ()
    return choose_calibration(trace, sequences)


def _earlier(folder: Path) -> Results | None:
    """The results that are in the folder; None where there is nothing."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    return Results.load(folder)


def _still_wanted(
    specs: list[MethodSpec], budgets: tuple[int, ...], before: Results | None
) -> tuple[list[Replayed], Results | None]:
    """The methods and budgets that are not there yet, and what is there less what is outdated."""
    if before is None:
        return [Replayed(spec, budgets) for spec in specs], None
    known = before.run["methods"]
    outdated = {
        str(spec)
        for spec in specs
        if str(spec) in known and known[str(spec)]["source_digest"] != spec.source_digest
    }
    before = before.without(outdated)
    wanted = []
    for spec in specs:
        there = before.topk(str(spec))
        missing = tuple(k for k in budgets if k not in there)
        if missing:
            wanted.append(Replayed(spec, missing))
    return wanted, before


def _store(trace: Trace, keep: bool) -> ReferenceStore:
    """Where exact answers are kept: beside the trace, if there is room and leave to write."""
    if not keep or isinstance(trace.path, RemoteLocation):
        return ReferenceStore(None)
    folder = exact_answers(trace.path)
    try:
        folder.mkdir(exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        log.warning("Exact answers are not kept for later runs: %s.", error)
        return ReferenceStore(None)
    if free < 4 * trace.nbytes():
        log.warning("Exact answers are not kept for later runs: %s has little room.", folder)
        return ReferenceStore(None)
    return ReferenceStore(folder)


def _replay_all(
    settings: _Settings,
    plan: Plan,
    device: torch.device,
    store: ReferenceStore,
    clock: Clock,
    progress: Progress | None,
) -> dict[int, list[Tally]]:
    """Every method's tally in every layer; sequences merge in the order of the plan."""
    trace = settings.trace
    tasks = [(layer, sequence) for layer in settings.layers for sequence in settings.sequences]

    def run(task: tuple[int, int]) -> tuple[list[Tally], Clock]:
        spent = Clock()
        with torch.inference_mode():
            return replay(trace, *task, plan, device, store, spent), spent

    tallies: dict[int, list[Tally]] = {}
    with clock.charge("total"):
        with torch.inference_mode(), clock.charge("causality"):
            _check_causality(settings, plan, device)
        with _workers(device) as workers:
            if progress is not None:
                progress(0, len(tasks))
            for done, ((layer, _), (parts, spent)) in enumerate(
                zip(tasks, workers.map(run, tasks), strict=True), start=1
            ):
                clock.add(spent)
                if layer in tallies:
                    for whole, part in zip(tallies[layer], parts, strict=True):
                        whole.merge(part)
                else:
                    tallies[layer] = parts
                if progress is not None:
                    progress(done, len(tasks))
    return tallies


@contextmanager
def _workers(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """One thread per core, each with arithmetic of one thread: the threads of one operation wait
    for each other, and on a machine that does other work besides, they wait long. One on a GPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(
        1 if device.type == "cuda" else threads,
        thread_name_prefix="replay",
        initializer=lambda: torch.set_num_threads(1),
    )
    try:
        yield pool
    finally:
        # What has not begun is not wanted when one task failed.
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _check_causality(settings: _Settings, plan: Plan, device: torch.device) -> None:
    """Try every method on the longest sequence's first unit before any time is spent."""
    trace = settings.trace
    longest = max(settings.sequences, key=trace.length)
    unit = next(load_units(trace.layer(settings.layers[0]), longest, device))
    for method in plan.methods:
        first = plan.first_counted(method.topk[0], len(unit.keys))
        if first > int(unit.positions[-1]):
            continue
        try:
            check_causality(
                method.spec.method,
                unit,
                plan.protocol,
                [method.topk[0]],
                first,
                method.calibration,
            )
        except RetraceError as error:
            raise RetraceError(f"{method.spec} {error}") from error


def _results(
    settings: _Settings,
    plan: Plan,
    tallies: dict[int, list[Tally]],
    clock: Clock,
    device: torch.device,
) -> Results:
    points, curves = [], []
    for i, method in enumerate(plan.methods):
        for layer, of_layer in tallies.items():
            tally = of_layer[i]
            module = settings.trace.layer(layer).rules.module
            labels = {"method": str(method.spec), "layer": layer, "module": module}
            for metric, moments in tally.at_all.items():
                frame = _frame(labels, metric, tally.ks, moments)
                curves.append(frame)
                points.append(frame[frame["topk"].isin(tally.topk)])
            for metric, moments in tally.at_points.items():
                points.append(_frame(labels, metric, tally.topk, moments))

    def join(frames: list[pd.DataFrame]) -> pd.DataFrame:
        frame = pd.concat(frames, ignore_index=True)
        frame["protocol"] = str(settings.protocol)
        frame["min_context"] = "10k" if settings.min_context is None else str(settings.min_context)
        return frame[COLUMNS]

    run = {
        "retrace": version("retrace-attention"),
        **settings.facts(),
        "trace_path": str(settings.trace.path),
        "model": settings.trace.attributes.get("model"),
        "task": settings.trace.attributes.get("task"),
        "dtype": settings.trace.attributes["dtype"],
        "sequences": list(settings.sequences),
        "methods": {
            str(m.spec): {
                "name": m.spec.name,
                "parameters": m.spec.parameters,
                "source": type(m.spec.method).source,
                "source_digest": m.spec.source_digest,
                "calibration": settings.calibration_digest(m.spec),
                "state": _cost([of_layer[i] for of_layer in tallies.values()]),
            }
            for i, m in enumerate(plan.methods)
        },
        "history": [
            {
                "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "methods": {str(m.spec): list(m.topk) for m in plan.methods},
                "device": _device_name(device),
                "threads": torch.get_num_threads(),
                "seconds": {name: round(s, 3) for name, s in clock.seconds.items()},
                "versions": {
                    "python": sys.version.split()[0],
                    **{name: version(name) for name in ("torch", "numpy", "zarr", "pandas")},
                },
            }
        ],
    }
    return Results(join(points), join(curves), run)


def _frame(
    labels: dict[str, Any], metric: str, ks: tuple[int, ...], moments: Moments
) -> pd.DataFrame:
    """Rows of one metric for all budgets and heads; no query counted gives NaN."""
    budgets, heads = moments.mean.shape
    none = moments.count == 0
    return pd.DataFrame(
        {
            **labels,
            "head": np.tile(np.arange(heads), budgets),
            "topk": np.repeat(ks, heads),
            "metric": metric,
            "mean": np.where(none, np.nan, moments.mean).ravel(),
            "std": moments.std().ravel(),
            "count": moments.count.astype(np.int64).ravel(),
        }
    )


def _cost(tallies: list[Tally]) -> dict[str, Any]:
    """What a method's states took, over all layers: how many were built, the seconds that took,
    and the bytes of the largest of one kv head, as replay holds it."""
    whole = Cost()
    for tally in tallies:
        whole.merge(tally.cost)
    return {
        "builds": whole.builds,
        "build_seconds": round(whole.seconds, 3),
        "largest_bytes": whole.state_bytes,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _clear(folder: Path) -> None:
    """Remove what a results folder holds, and nothing else that may lie there."""
    for name in ("metrics.parquet", "curves.parquet", "table.md", "run.json"):
        (folder / name).unlink(missing_ok=True)
    for pattern in PLOTS:
        for plot in (folder / "plots").glob(pattern):
            plot.unlink()
