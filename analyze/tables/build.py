"""From what was tallied to results."""

import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from retrace.analyze.methods.base import BlockMethod, Method
from retrace.analyze.metrics.buckets import first_of
from retrace.analyze.metrics.moments import Moments
from retrace.analyze.metrics.patterns import KINDS, PATTERNS, kinds
from retrace.analyze.metrics.possible import impossible
from retrace.analyze.metrics.registry import BUCKETED, MEDIAN, TAILED
from retrace.analyze.metrics.tails import Tails
from retrace.analyze.replay.parts import Job
from retrace.analyze.replay.tally import Tally
from retrace.analyze.selection.states import Cost
from retrace.analyze.storage.journal import Task
from retrace.analyze.tables.columns import (
    COLUMNS,
    PATTERN_COLUMNS,
    PERCENTILE_COLUMNS,
    POSITION_COLUMNS,
    PROJECTED_COLUMNS,
    SEQUENCE_COLUMNS,
    TAIL_COLUMNS,
)
from retrace.analyze.tables.figures import Figures
from retrace.analyze.tables.locality import tabulate_locality
from retrace.analyze.units.protocol import Protocol
from retrace.traces import RetraceError

Columns = dict[str, npt.NDArray[Any]]
"""Rows of a table, by column."""


def tabulate(
    job: Job,
    parts: Mapping[Task, list[Tally]],
    missing: Mapping[Task, str],
    spent: dict[str, Any],
) -> Figures:
    """Figures with a row for every method, layer, head, budget and metric.

    `parts` are the tallies of each task, in the order in which they merge, `missing` says why some
    are not there, and `spent` is what `Clock.facts` says of the run.
    """
    settings, plan = job.settings, job.plan
    tallies = _by_layer(parts)
    points, curves = [], []
    for i, method in enumerate(plan.methods):
        for layer, of_layer in tallies.items():
            tally = of_layer[i]
            module = settings.trace.layer(layer).rules.module
            labels = {"method": str(method.spec), "layer": layer, "module": module}
            for metric, moments in tally.at_all.items():
                columns = _columns(labels, metric, tally.ks, moments)
                asked = np.isin(columns["topk"], tally.topk)
                curves.append(columns)
                points.append({name: column[asked] for name, column in columns.items()})
            for metric, moments in tally.at_points.items():
                points.append(_columns(labels, metric, tally.topk, moments))
            points.append(_medians(labels, tally))

    def join(parts: list[Columns]) -> pd.DataFrame:
        frame = _joined(parts)
        frame["protocol"] = str(settings.counting.protocol)
        frame["min_context"] = settings.counting.column()
        return frame[COLUMNS]

    run = {
        "retrace": version("retrace-attention"),
        **settings.facts(),
        "trace_path": str(settings.trace.path),
        "model": settings.trace.attributes.get("model"),
        "task": settings.trace.attributes.get("task"),
        "dtype": settings.trace.attributes["dtype"],
        "natively_sparse": settings.trace.natively_sparse,
        "sequences": list(settings.sequences),
        "methods": {
            str(m.spec): {
                "name": m.spec.name,
                "parameters": m.spec.parameters,
                "source": type(m.spec.method).source,
                "charged": m.spec.method.charged,
                **_looks_at(m.spec.method, settings.counting.protocol),
                "given": m.spec.text is None or m.spec.label is not None,
                **settings.made_by(m.spec),
                "state": _cost([of_layer[i] for of_layer in tallies.values()]),
            }
            for i, m in enumerate(plan.methods)
        },
        "outdated": [],  # methods of a folder that other code gave
        "damaged_sequences": [
            {"sequence": sequence, "cause": cause}
            for sequence, cause in settings.trace.left_out.items()
        ],
        "missing": [
            {
                "layer": layer,
                "sequence": sequence,
                "cause": cause,
                "methods": {str(m.spec): list(m.topk) for m in plan.methods},
            }
            for (layer, sequence), cause in missing.items()
        ],
        "history": [
            {
                "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "methods": {str(m.spec): list(m.topk) for m in plan.methods},
                # Whose parts are of no more use.
                "whole": job.digest if len(parts) == len(job.tasks) else None,
                "device": _device_name(job.device),
                "threads": torch.get_num_threads(),
                "profile": spent,
                "versions": {
                    "python": sys.version.split()[0],
                    **{name: version(name) for name in ("torch", "numpy", "zarr", "pandas")},
                },
            }
        ],
    }
    each, along = _by_sequence(job, parts), _by_bucket(job, tallies)
    patterns, moves = _head_patterns(job, tallies), tabulate_locality(job, tallies)
    ends, projected = _tails(job, tallies), _projected(job, tallies)
    return Figures(join(points), join(curves), run, each, along, patterns, moves, ends, projected)


def _looks_at(method: Method, protocol: Protocol) -> dict[str, str]:
    """Which queries a method looks at to choose keys for a block of them; nothing of others."""
    if not isinstance(method, BlockMethod):
        return {}
    end = "the prompt's last" if protocol.chunk is None else "the chunk's last"
    return {"looks_at": "its own block" if method.looks == "block" else end}


def _by_layer(parts: Mapping[Task, list[Tally]]) -> dict[int, list[Tally]]:
    """The tallies of all sequences of a layer as one."""
    layers: dict[int, list[Tally]] = {}
    for (layer, _), part in parts.items():
        wholes = layers.setdefault(layer, [Tally(tally.ks, tally.topk) for tally in part])
        for whole, tally in zip(wholes, part, strict=True):
            whole.merge(tally)
    return layers


def _by_sequence(job: Job, parts: Mapping[Task, list[Tally]]) -> pd.DataFrame:
    """Rows of every sequence at the budgets asked for, less those that no query counts for."""
    found = []
    for i, method in enumerate(job.plan.methods):
        for (layer, sequence), tallies in parts.items():
            tally = tallies[i]
            labels = {
                "method": str(method.spec),
                "layer": layer,
                "module": job.settings.trace.layer(layer).rules.module,
                "sequence": sequence,
            }
            places = [tally.ks.index(k) for k in tally.topk]
            asked = {m: moments.take(places) for m, moments in tally.at_all.items()}
            for metric, moments in {**asked, **tally.at_points}.items():
                found.append(_columns(labels, metric, tally.topk, moments))
    rows = _joined(found)
    rows = rows.loc[rows["count"] > 0, list(SEQUENCE_COLUMNS)].reset_index(drop=True)
    return rows.astype(SEQUENCE_COLUMNS)


def _by_bucket(job: Job, tallies: Mapping[int, list[Tally]]) -> pd.DataFrame:
    """Rows of every bucket of queries at the budgets asked for, less those without a query."""
    found: list[Columns] = [{name: np.empty(0, object) for name in POSITION_COLUMNS}]
    for i, method in enumerate(job.plan.methods):
        for layer, of_layer in tallies.items():
            for axis, moments in of_layer[i].by_bucket.items():
                at = np.nonzero(moments.count)
                bucket, budget, metric, head = at
                labels = {
                    "method": str(method.spec),
                    "layer": layer,
                    "module": job.settings.trace.layer(layer).rules.module,
                    "axis": axis,
                }
                found.append(
                    {
                        **_repeated(labels, len(head)),
                        "head": head,
                        "topk": np.array(of_layer[i].topk)[budget],
                        "metric": np.array(BUCKETED, object)[metric],
                        "first": np.array([first_of(b) for b in bucket.tolist()], np.int64),
                        "mean": moments.mean[at],
                        "std": moments.std()[at],
                        "count": moments.count[at],
                    }
                )
    return _joined(found).astype(POSITION_COLUMNS)


def _head_patterns(job: Job, tallies: Mapping[int, list[Tally]]) -> pd.DataFrame:
    """Rows of every head's patterns, less those that no sequence counts for."""
    found: list[Columns] = [{name: np.empty(0, object) for name in PATTERN_COLUMNS}]
    for layer, (tally, *_) in tallies.items():
        if tally.patterns is None:
            continue
        moments = tally.patterns
        best = np.array(KINDS)[kinds(moments.mean)]
        head, pattern = np.nonzero(moments.count.T)
        labels = {"layer": layer, "module": job.settings.trace.layer(layer).rules.module}
        named = np.array(PATTERNS, object)[pattern]
        found.append(
            {
                **_repeated(labels, len(head)),
                "head": head,
                "pattern": named,
                "mean": moments.mean[pattern, head],
                "std": moments.std()[pattern, head],
                "count": moments.count[pattern, head],
                "best": named == best[head],
            }
        )
    return _joined(found)[list(PATTERN_COLUMNS)].astype(PATTERN_COLUMNS)


def _tails(job: Job, tallies: Mapping[int, list[Tally]]) -> pd.DataFrame:
    """Rows of percentiles and worst queries at the budgets asked for, less those of no query."""
    found: list[Columns] = [{name: np.empty(0, object) for name in TAIL_COLUMNS}]
    for i, method in enumerate(job.plan.methods):
        for layer, of_layer in tallies.items():
            tails = of_layer[i].tails
            if tails is None:
                continue
            counts = tails.counts()
            at = np.nonzero(counts)
            budget, metric, head = at
            labels = {
                "method": str(method.spec),
                "layer": layer,
                "module": job.settings.trace.layer(layer).rules.module,
            }
            found.append(
                {
                    **_repeated(labels, len(head)),
                    "head": head,
                    "topk": np.array(of_layer[i].topk)[budget],
                    "metric": np.array(TAILED, object)[metric],
                    **{
                        name: tails.percentile(percent)[at]
                        for name, percent in PERCENTILE_COLUMNS.items()
                    },
                    "worst": tails.worst.figure[at],
                    "worst_sequence": tails.worst.sequence[at],
                    "worst_position": tails.worst.position[at],
                    "count": counts[at],
                }
            )
    return _joined(found).astype(TAIL_COLUMNS)


def _projected(job: Job, tallies: Mapping[int, list[Tally]]) -> pd.DataFrame:
    """Rows of errors after the output projection, less those of no query."""
    found: list[Columns] = [{name: np.empty(0, object) for name in PROJECTED_COLUMNS}]
    for i, method in enumerate(job.plan.methods):
        for layer, of_layer in tallies.items():
            moments = of_layer[i].projected
            if moments is None:
                continue
            at = np.nonzero(moments.count)
            labels = {
                "method": str(method.spec),
                "layer": layer,
                "module": job.settings.trace.layer(layer).rules.module,
            }
            found.append(
                {
                    **_repeated(labels, len(at[0])),
                    "topk": np.array(of_layer[i].topk)[at],
                    "mean": moments.mean[at],
                    "std": moments.std()[at],
                    "count": moments.count[at],
                }
            )
    return _joined(found)[list(PROJECTED_COLUMNS)].astype(PROJECTED_COLUMNS)


def _columns(labels: dict[str, Any], metric: str, ks: tuple[int, ...], moments: Moments) -> Columns:
    """Rows of one metric for all budgets and heads; no query counted gives NaN."""
    budgets, heads = moments.mean.shape
    none = moments.count == 0
    if metric != MEDIAN and (wrong := impossible(metric, moments) & ~none).any():
        budget, head = np.argwhere(wrong)[0].tolist()
        raise RetraceError(
            f"{labels['method']} came to a figure that cannot be, {metric} of "
            f"{moments.mean[budget, head]:.6g} in layer {labels['layer']}, head {head}, at top-k "
            f"{ks[budget]}."
        )
    return {
        **_repeated({**labels, "metric": metric}, budgets * heads),
        "head": np.tile(np.arange(heads), budgets),
        "topk": np.repeat(ks, heads),
        "mean": np.where(none, np.nan, moments.mean).ravel(),
        "std": moments.std().ravel(),
        "count": moments.count.astype(np.int64).ravel(),
    }


def _medians(labels: dict[str, Any], tally: Tally) -> Columns:
    """Rows of the median error norms, where the means stand of other metrics."""
    moments = tally.at_points["error_norm"]
    none = np.full_like(moments.mean, np.nan)
    tails = Tails.empty(*none.shape) if tally.tails is None else tally.tails
    counts = tails.counts()[:, TAILED.index("error_norm")].astype(np.float64)
    columns = _columns(labels, MEDIAN, tally.topk, Moments(counts, none, none))
    return {**columns, "mean": tails.medians("error_norm").ravel(), "std": none.ravel()}


def _repeated(labels: dict[str, Any], rows: int) -> Columns:
    return {
        name: np.full(rows, label, object if isinstance(label, str) else np.int64)
        for name, label in labels.items()
    }


def _joined(parts: list[Columns]) -> pd.DataFrame:
    """The rows of all parts. One table is made at the end, since each takes a millisecond, and
    there are as many parts as methods, layers, sequences and metrics multiply to."""
    return pd.DataFrame({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


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
