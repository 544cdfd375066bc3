"""`compare`: how far runs of a model with a method in the loop drift from the exact run."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Unpack

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from retrace.analyze.arguments import choose_device, choose_layers, scores
from retrace.analyze.exact.reference import exact_pass
from retrace.analyze.metrics.moments import Moments
from retrace.analyze.options import WorkOptions, with_defaults
from retrace.analyze.replay.approximation import (
    Approximation,
    check_exact,
    model_weights,
    transformers_release,
)
from retrace.analyze.tables.drift import Drift, Place
from retrace.analyze.tables.intervals import interval_of_mean
from retrace.analyze.units.unit import Unit, load_units
from retrace.analyze.workers.retry import finished, name_missing, none_left
from retrace.analyze.workers.start import start_workers
from retrace.traces import Location, RetraceError, Trace, open_trace, prompts
from retrace.traces.progress import ShowDone

log = logging.getLogger("retrace")

PASSES = 3
"""Attention that is computed of each layer: exact of both runs, and the method's."""
Distances = dict[tuple[str, str], Moments]
"""Moments over positions (heads,) by tensor and metric."""
Answer = Callable[[Unit], Tensor]
"""Attention output (group, queries, value channels) of a unit."""


def compare(
    exact: Trace | str | Location,
    runs: Sequence[Trace | str | Location],
    *,
    methods: Sequence[str] = (),
    progress: ShowDone | None = None,
    **options: Unpack[WorkOptions],
) -> Drift:
    """Compare runs of a model with a method in the loop with the exact run over the same tokens.

    All figures are of the queries that the method answers: positions before it begins, which the
    exact model reads, are left out.

    Args:
        exact: the trace of the exact run.
        runs: traces captured with `approximate`, of the same tokens and layers.
        methods: specs of methods in loose files, such as `./mine.py:Mine`, that were in the loop:
            a file is run only where it is named here.
        progress: told how many layers of sequences are done, and of how many.
        options: `retrace.analyze.options.WorkOptions` says what each is.

    Raises:
        RetraceError: a run that is none, or over other tokens.
    """
    exact = exact if isinstance(exact, Trace) else open_trace(exact)
    others = [run if isinstance(run, Trace) else open_trace(run) for run in runs]
    check_exact(exact)
    chosen = with_defaults(options, WorkOptions)
    indices, target = choose_layers(exact, chosen["layers"]), choose_device(chosen["device"])
    paired = [_paired(exact, other, methods) for other in others]
    for run in paired:
        run.warn_of_code()
    work = PASSES * sum(scores(exact, indices, run.sequences) for run in paired)
    with start_workers(target, chosen["workers"], work, chosen["executor"]) as (pool, _):
        paired = [run.calibrated(exact, indices, target, pool) for run in paired]
        named = dict(zip(_names(paired), paired, strict=True))
        calls = {
            (name, index, sequence): partial(
                _layer_drift, exact, run.of_layer(index), index, sequence, target
            )
            for name, run in named.items()
            for index in indices
            for sequence in run.sequences
        }
        found, missing = _all_finished(pool, calls, progress)
    drift = _merged({at: found[at] for at in calls if at in found})
    likelihoods = {name: _likelihoods(name, exact, run) for name, run in named.items()}
    return Drift(
        pd.DataFrame(
            row
            for (name, index), distances in drift.items()
            for row in _rows(name, index, exact.layer(index).rules.module, distances)
        ),
        pd.concat(likelihoods.values(), ignore_index=True),
        pd.DataFrame(_summary(n, r, likelihoods[n]) for n, r in named.items()),
        {"missing": [[*at, why] for at, why in missing.items()]},
    )


@dataclass(frozen=True)
class _Run:
    """A run with a method in the loop."""

    trace: Trace
    approximation: Approximation

    @property
    def sequences(self) -> list[int]:
        """Those that the method has not learnt from, as far as it predicts a token of them."""
        learnt = self.approximation.calibration_sequences
        return [
            s
            for s in self.trace.sequences
            if s not in learnt and self.first(s) < self.trace.length(s) - 1
        ]

    @property
    def code(self) -> str:
        """What is known of the code in the loop; see `Approximation.code_of_run`."""
        return self.approximation.code_of_run(self.trace)

    def warn_of_code(self) -> None:
        """Say where the code in the loop was another, or nobody knows."""
        if self.code != "same":
            log.warning(
                "%s %s: its errors of `output` are what the code of now gives for what the layers "
                "saw then. Its other figures are the run's own.",
                self.trace.path,
                f"was captured with other code of {self.approximation.spec}, or of retrace, than "
                "there is now"
                if self.code == "changed"
                else f"does not tell which code of {self.approximation.spec} was in the loop",
            )

    def calibrated(
        self, exact: Trace, layers: tuple[int, ...], device: torch.device, pool: Executor
    ) -> "_Run":
        """With what the method learns of these layers."""
        return replace(
            self, approximation=self.approximation.calibrated(exact, layers, device, pool)
        )

    def of_layer(self, index: int) -> "_Run":
        """Without what the method learned of other layers."""
        return replace(self, approximation=self.approximation.of_layer(index))

    @cached_property
    def _prompts(self) -> dict[int, int | None]:
        sequences = self.trace.sequences
        return dict(zip(sequences, prompts([self.trace.phase(s) for s in sequences]), strict=True))

    def prefix(self, sequence: int) -> int | None:
        """How many positions the exact model reads; None where there is no prefix."""
        return self.approximation.first_position(self._prompts[sequence])

    def first(self, sequence: int) -> int:
        """The first position whose query the method answers."""
        return self.prefix(sequence) or 0


def _paired(exact: Trace, other: Trace, methods: Sequence[str]) -> _Run:
    """A run of the same tokens as the exact one's."""
    run = _Run(other, Approximation.of_run(other, methods))
    _check_same_weights(exact, other)
    if other.layers != exact.layers:
        raise RetraceError(f"{other.path} holds other layers than {exact.path}.")
    for sequence in other.sequences:
        if sequence not in exact.sequences or not (
            np.array_equal(other.tokens(sequence), exact.tokens(sequence))
            and np.array_equal(other.query_positions(sequence), exact.query_positions(sequence))
        ):
            raise RetraceError(
                f"{other.path} has another sequence {sequence} than {exact.path}: capture it with "
                f"--reference {exact.path}."
            )
    if not run.sequences:
        raise RetraceError(f"{other.path} has no sequence in which its method predicts a token.")
    return run


def _check_same_weights(exact: Trace, other: Trace) -> None:
    """Refuse traces of two models: what is between these would be charged to the method."""
    ours, theirs = (model_weights(trace) for trace in (exact, other))
    if ours == theirs and ours is not None:
        return
    releases = [transformers_release(trace) for trace in (exact, other)]
    if ours is None or theirs is None or releases[0] != releases[1]:
        log.warning(
            "%s and %s do not tell whether their models have the same weights: one is of an older "
            "retrace, or they are of two releases of transformers.",
            exact.path,
            other.path,
        )
        return
    raise RetraceError(
        f"{other.path} was captured with another model than {exact.path}: its weights have digest "
        f"{theirs[:8]}, and {ours[:8]} there. Capture it anew with --reference {exact.path}."
    )


def _names(runs: Sequence[_Run]) -> list[str]:
    """What each run is called: its method and budget, or its path where two are alike."""
    names = [f"{run.approximation.spec}, top-k {run.approximation.topk}" for run in runs]
    return [
        name if names.count(name) == 1 else str(run.trace.path)
        for name, run in zip(names, runs, strict=True)
    ]


def _likelihoods(name: str, exact: Trace, run: _Run) -> pd.DataFrame:
    frames = []
    for sequence in run.sequences:
        before, after = (t.nll(sequence).astype(np.float64) for t in (exact, run.trace))
        counted = slice(run.first(sequence), -1)  # the last position predicts nothing
        kl = run.trace.kl(sequence)
        frame = pd.DataFrame(
            {
                "run": name,
                "sequence": sequence,
                "position": np.arange(len(before)),
                "exact": before,
                "approximate": after,
                "difference": after - before,
                "kl": np.nan if kl is None else kl.astype(np.float64),
            }
        )
        frames.append(frame[counted].dropna(subset="difference"))
    return pd.concat(frames, ignore_index=True)


def _summary(name: str, run: _Run, likelihoods: pd.DataFrame) -> dict[str, Any]:
    by_sequence = likelihoods.groupby("sequence")["difference"].agg(["sum", "count"])
    low, high = interval_of_mean(by_sequence["sum"].to_numpy(), by_sequence["count"].to_numpy())
    return {
        "run": name,
        "method": str(run.approximation.spec),
        "topk": run.approximation.topk,
        "code": run.code,
        "perplexity": float(np.exp(likelihoods["approximate"].mean())),
        "exact_perplexity": float(np.exp(likelihoods["exact"].mean())),
        "difference": float(likelihoods["difference"].mean()),
        "low": low,
        "high": high,
        "kl": float(likelihoods["kl"].mean()),
    }


def _all_finished(
    pool: Executor,
    calls: Mapping[Place, Callable[[], Distances]],
    progress: ShowDone | None,
) -> tuple[dict[Place, Distances], dict[Place, str]]:
    """What the calls give, and what ended the workers of those that are missing."""
    found: dict[Place, Distances] = {}
    missing: dict[Place, str] = {}
    for at, answer in finished(pool, calls):
        if isinstance(answer, BrokenExecutor):
            missing[at] = str(answer)
            name_missing(*at[1:], answer)
        else:
            found[at] = answer
        if progress is not None:
            progress(len(found) + len(missing), len(calls))
    if missing and not found:
        raise none_left(missing.values())
    return found, missing


def _merged(found: Mapping[Place, Distances]) -> dict[tuple[str, int], Distances]:
    """Those of a run's layers, their sequences merged in the order given."""
    merged: dict[tuple[str, int], Distances] = {}
    for (run, layer, _), part in found.items():
        known = merged.setdefault((run, layer), {})
        for place, moments in part.items():
            known[place] = known[place].merge(moments) if place in known else moments
    return merged


@torch.inference_mode()
def _layer_drift(
    exact: Trace, run: _Run, index: int, sequence: int, device: torch.device
) -> Distances:
    """How far a layer of a sequence has drifted."""
    pairs: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    units = [load_units(trace.layer(index), sequence, device) for trace in (exact, run.trace)]
    answer, first = _answer(run, index, sequence), run.first(sequence)
    for before, after in zip(*units, strict=True):
        row = int(torch.searchsorted(before.positions, first))
        pairs["query"].append((before.queries[:, row:], after.queries[:, row:]))
        pairs["key"].append((before.keys[None, first:], after.keys[None, first:]))
        pairs["value"].append((before.values[None, first:], after.values[None, first:]))
        pairs["output"].append((_exact(before)[:, row:], answer(after)[:, row:]))
    found: Distances = {}
    for tensor, parts in pairs.items():
        x, y = (torch.cat(side).double() for side in zip(*parts, strict=True))
        size = x.norm(dim=-1) * y.norm(dim=-1)
        error = (y - x).norm(dim=-1) / x.norm(dim=-1)
        everything = torch.ones(1, x.shape[1], dtype=torch.bool, device=device)
        found[tensor, "error"] = Moments.of(error, everything)
        found[tensor, "cosine"] = Moments.of((x * y).sum(dim=-1) / size, everything)
    return found


def _exact(unit: Unit) -> Tensor:
    """Exact attention output (group, queries, value channels)."""
    outputs = [exact_pass(block, 1).output for block in unit.blocks(0)]
    return torch.cat(outputs, dim=1)


def _answer(run: _Run, index: int, sequence: int) -> Answer:
    """What a layer of the run gave, computed as it was then from what the layer saw."""
    chosen = run.approximation
    if index in chosen.dense_layers:
        return _exact
    prefix, first = run.prefix(sequence), run.first(sequence)

    def answer(unit: Unit) -> Tensor:
        output = _exact(unit)
        row = int(torch.searchsorted(unit.positions, first))
        own = chosen.of_head(unit.group, first or len(unit.keys))
        if own is not None and row < output.shape[1]:
            output[:, row:] = own.output(own.states(unit, prefix), unit, first)
        return output

    return answer


def _rows(run: str, index: int, module: str, found: Distances) -> Iterator[dict[str, Any]]:
    """One row per head, tensor and metric."""
    for (tensor, metric), moments in found.items():
        for head, (mean, std, count) in enumerate(
            zip(moments.mean, moments.std(), moments.count, strict=True)
        ):
            yield {
                "run": run,
                "layer": index,
                "module": module,
                "head": head,
                "tensor": tensor,
                "metric": metric,
                "mean": mean,
                "std": std,
                "count": int(count),
            }
