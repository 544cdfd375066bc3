"""`evaluate`: what methods in the loop cost a model, beside what replay says of them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from retrace.analyze import Results, analyze, parse_specs
from retrace.analyze.arguments import choose_calibration
from retrace.analyze.methods.specs import Methods, MethodSpec, PlanSpec
from retrace.analyze.metrics.registry import AT_BLOCKS
from retrace.analyze.replay.approximation import check_exact, model_weights
from retrace.analyze.replay.kept import (
    made_now,
    note_kept,
    outdated_among,
    outdated_besides,
    when_made,
)
from retrace.analyze.replay.trials import able_to_learn
from retrace.analyze.storage.provenance import ENGINE, code_digest
from retrace.analyze.tables.intervals import interval_of_mean
from retrace.analyze.tables.saved import SAVING, names_in
from retrace.analyze.units.costs import SERVING_DTYPE, is_charged
from retrace.capture.attention.interface import observed_attention
from retrace.capture.attention.recorder import AttentionLayer, dtype_of
from retrace.capture.checks.runs import check_decoding, check_loop
from retrace.capture.checks.trace import examine
from retrace.capture.loop.approximate import Approximator, prepare
from retrace.capture.loop.exact_runs import ExactRuns
from retrace.capture.model.likelihood import likelihoods
from retrace.capture.model.loading import (
    check_vocabulary,
    input_device,
    open_checkpoint,
    quiet_libraries,
)
from retrace.capture.reading.sequences import (
    Reading,
    like_reference,
    read_reference,
)
from retrace.capture.recording.identity import check_same_model, weights_digest
from retrace.capture.settings import CaptureSettings
from retrace.capture.tables.evaluation import Evaluation
from retrace.traces import Location, RetraceError, Trace, open_trace, prompts
from retrace.traces.progress import ShowStage
from retrace.traces.storage.durable import within
from retrace.traces.storage.lock import LOCK, check_files, check_leave, one_at_a_time

FIGURES = ("recall", "attention_fraction", "error_norm", "density", "bytes_ratio")
"""Of replay, each the mean over layers and heads."""
BEFORE = {"counted_from": 0, "protocol": None}
"""What held of evaluations that do not say it: the exact positions before a method were counted,
and every query was answered alone."""


@one_at_a_time
def evaluate(
    exact: Trace | str | Location,
    methods: Methods,
    topk: Sequence[int],
    *,
    protocol: str | None = None,
    from_position: int | None = None,
    dense_layers: Sequence[int] = (),
    device: str = "auto",
    device_map: str | Path | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    again: bool = False,
    progress: ShowStage | None = None,
) -> Evaluation:
    """Run a trace's model with methods in the loop, one point after another, storing no tensors.

    The model reads the trace's tokens with a method in place of exact attention, as `capture` does
    with `approximate`. Beside what that costs stand the figures that replay gives for the method
    and budget on the exact trace. Both are of the queries that the method answers: all of them, or
    those from `from_position` on (and replay's of those that the trace kept).

    Args:
        exact: the trace of the exact run.
        methods: as in `analyze`.
        topk: budgets: keys per query and head.
        protocol: `prefill:B` or `prefill:B:chunk=C`, for methods that answer blocks of queries; by
            default each query is answered alone.
        from_position: positions before it attend exactly, and fitted states are built there; where
            the trace's tokens were decoded one by one, that is where decoding began.
        dense_layers: layers that attend exactly, and that replay leaves out.
        device: device of the model and the replay: `auto`, `cpu`, `cuda`, `cuda:N`.
        device_map: how the model is spread over devices, as `capture` takes it; by default as it
            was for the trace, unless a device is named.
        out: folder for the table, and for replay's results in `replay`. Points that it holds
            already are not run again, as long as they come from the same code.
        overwrite: throw away what is in `out`.
        again: run these methods again at every budget that `out` holds or that is asked for, as in
            `analyze`.
        progress: told how far it is.

    Raises:
        RetraceError: anything the user can mend.
    """
    exact = exact if isinstance(exact, Trace) else open_trace(exact)
    check_exact(exact)
    specs, every = parse_specs(methods)
    specs = able_to_learn(exact, specs, every)
    folder = None if out is None else Path(out)
    show = progress or (lambda *_: None)
    reading = read_reference(exact, None)
    if protocol is not None and any(prompt is not None for prompt in prompts(reading.phases)):
        raise RetraceError(
            f"{exact.path} has tokens that were decoded one by one, and a prefill reads whole "
            "sequences at once: capture one without --generate."
        )
    first = _first_position(from_position, prompts(reading.phases))
    learns = any(spec.method.calibrated for spec in specs)
    held_out = choose_calibration(exact, None) if learns else ()
    longest = max(exact.length(s) for s in exact.sequences if s not in held_out)
    if (first or 0) >= longest - 1:
        raise RetraceError(
            f"The method would begin at position {first}, and predict nothing: the longest "
            f"sequence has {longest} tokens. Name an earlier one (--from-position)."
        )
    facts = {
        "trace": [exact.digest(s) for s in exact.sequences],
        "protocol": protocol,
        "from_position": first,
        "counted_from": first or 0,
        **({} if (weights := model_weights(exact)) is None else {"weights": weights}),
        "dense_layers": sorted(set(dense_layers)),
        "calibration": list(held_out),
        "serving_dtype": SERVING_DTYPE,
        "retrace": version("retrace-attention"),
    }
    found = _earlier(folder, facts, overwrite)
    check_files(folder, Evaluation.files())
    if not topk and not all(isinstance(spec, PlanSpec) for spec in specs):
        raise RetraceError("How many keys may a method attend? Say so with topk.")
    asked = {str(spec): spec.budgets(topk, first or longest) for spec in specs}
    found, budgets = _still_good(found, specs, asked, again)
    replayed = analyze(
        exact,
        methods,
        sorted({k for spec in specs if not isinstance(spec, PlanSpec) for k in budgets[str(spec)]}),
        out=None if folder is None else within(folder, "replay"),
        protocol=protocol or ("all" if first is None else f"prefix:{first}"),
        min_context=first or 0,
        layers=[i for i in exact.layers if i not in dense_layers],
        calibration_sequences=held_out or None,
        device=device,
        overwrite=overwrite,
        again=again,
        progress=lambda done, total: show("Replaying", done, total),
    )
    ran = replayed.methods()  # of `all`, not every method runs on every trace
    wanted = [
        (s, k) for s in specs for k in budgets[str(s)] if str(s) in ran and not found.has(str(s), k)
    ]
    if not wanted:
        return found
    check_leave(folder)
    settings = CaptureSettings(
        reference=str(exact.path),
        approximate=str(specs[0]),
        topk=wanted[0][1],
        protocol=protocol,
        from_position=from_position,
        dense_layers=dense_layers,
        device=device if device_map is None else "auto",
        device_map=device_map,
    )
    show("Loading the model", 0, 1)
    with quiet_libraries():
        loop = _Loop(exact, reading, like_reference(exact, settings), held_out, first or 0)
    if "weights" not in facts:  # an older trace does not say
        facts["weights"] = loop.weights
        if found.facts.get("weights", loop.weights) != loop.weights:
            raise _others(folder, "weights")
    show("Loading the model", 1, 1)
    total = len(wanted) * len(loop.sequences)
    for place, (spec, k) in enumerate(wanted):
        show("Evaluating", place * len(loop.sequences), total)
        row = {"method": str(spec), "topk": k}
        sums = []
        for one in loop.run(spec, k):
            sums.append(one)
            show("Evaluating", place * len(loop.sequences) + len(sums), total)
        row |= _cost(np.array(sums)) | _figures(replayed, str(spec), k)
        row["charged"] = is_charged(replayed.run, str(spec))
        points = [*found.points.to_dict("records"), row]
        noted = found.facts["methods"]
        made = made_now(_made_by(spec), k, noted.get(str(spec), {}))
        told = {**found.facts, **facts, "methods": {**noted, str(spec): made}}
        found = Evaluation(pd.DataFrame(points), told)
        if folder is not None:
            found.save(folder)
    return found


def _made_by(spec: MethodSpec) -> dict[str, str | None]:
    """What a point of a method comes from besides what all of them share."""
    return {"code": spec.code.digest, "engine": code_digest(__name__, *ENGINE)}


def _still_good(
    found: Evaluation,
    specs: Sequence[MethodSpec],
    topk: Mapping[str, Sequence[int]],
    again: bool,
) -> tuple[Evaluation, dict[str, list[int]]]:
    """The points that the code of now would give too, and the budgets wanted of each method."""
    noted = found.facts.get("methods", {})
    known = {method: noted.get(method, {}) for method in found.points["method"].unique()}
    asked = {str(spec): _made_by(spec) for spec in specs}
    outdated = outdated_among(asked, known)
    points = found.points
    budgets = {name: sorted(set(topk[name])) for name in asked}
    for name in asked if again else ():
        held = map(int, points.loc[points["method"] == name, "topk"])
        budgets[name] = sorted({*topk[name], *held})
    found = found.without(asked if again else outdated)
    note_kept(
        (name, k, when_made(known[name], k))
        for name in asked
        for k in budgets[name]
        if found.has(name, k)
    )
    others = outdated_besides(specs, known, _made_by, code_digest(__name__, *ENGINE))
    facts = {**found.facts, "methods": noted, "outdated": others}
    return dataclasses.replace(found, facts=facts), budgets


def _first_position(said: int | None, read_at_once: Sequence[int | None]) -> int | None:
    """Where the method begins, if not with the first query."""
    if said is not None:
        return said
    if len(set(read_at_once)) > 1:
        raise RetraceError(
            "Decoding began at different positions of the trace's sequences, and replay has one "
            "for all: name one (--from-position)."
        )
    return read_at_once[0]


def _earlier(folder: Path | None, facts: dict[str, Any], overwrite: bool) -> Evaluation:
    """The points that the folder holds; none where there is nothing."""
    none = Evaluation(pd.DataFrame(columns=["method", "topk"]), facts)
    if folder is None or not folder.is_dir():
        return none
    there, points = names_in(folder), "evaluation.parquet"
    begun = {name.removesuffix(".partial") for name in there - {LOCK, SAVING}}
    if begun <= {*Evaluation.files(), "replay"} and not {points, "evaluation.json"} <= there:
        return none  # empty, or ended before the first point was whole
    if points not in there:
        raise RetraceError(
            f"{folder} is not empty, and no evaluation of retrace: choose another with --out."
        )
    if overwrite:
        return none
    found = Evaluation.load(folder)
    unsaid = {name: facts[name] for name in ("weights",) if name in facts}  # they are the trace's
    known = BEFORE | unsaid | found.facts
    different = [name for name in facts if name != "retrace" and known.get(name) != facts[name]]
    if different:
        raise _others(folder, " and ".join(different))
    return found


def _others(folder: Path | None, what: str) -> RetraceError:
    return RetraceError(
        f"{folder} holds points of another {what}: choose another folder with --out, or replace it "
        "with --overwrite."
    )


class _Loop:
    """A model that reads a trace's tokens with one method after another."""

    def __init__(
        self,
        exact: Trace,
        reading: Reading,
        settings: CaptureSettings,
        calibration: Sequence[int],
        first: int,
    ) -> None:
        self._exact = exact
        self._settings = settings
        self._first = first
        self.sequences = [
            s for s in exact.sequences if s not in calibration and first < exact.length(s) - 1
        ]
        self._tokens = dict(zip(exact.sequences, reading.tokens, strict=True))
        self._prompts = dict(zip(exact.sequences, prompts(reading.phases), strict=True))
        self._model = open_checkpoint(settings).load(settings.dtype, settings.device)
        self._exact_runs = ExactRuns(self._model)
        check_vocabulary(self._model, reading.tokens)
        self.weights = weights_digest(self._model)
        check_same_model(exact, self._model, self.weights, settings.pretrained)
        longest = max(reading.tokens, key=len)
        self._layers: dict[int, AttentionLayer] = dict(examine(self._model, longest))
        self._decoding = check_decoding(
            self._model, reading.tokens, reading.phases, 0, dtype_of(self._layers), len(longest)
        )
        decodes = any(prompt is not None for prompt in self._prompts.values())
        check_loop(self._model, self._layers, longest, decoding=self._decoding if decodes else None)

    def run(self, spec: MethodSpec, k: int) -> Iterator[tuple[float, float, float, int]]:
        """For each sequence: the sums over the tokens that the method predicts of the exact and of
        the approximate negative log-likelihood and of the divergence, and how many those are."""
        settings = dataclasses.replace(self._settings, approximate=str(spec), topk=k)
        approximation = prepare(spec, settings, self._layers, self._exact)
        approximator = Approximator(approximation, self._layers)
        for sequence in self.sequences:
            prompt = self._prompts[sequence]
            tokens = torch.from_numpy(self._tokens[sequence]).long()[None]
            tokens = tokens.to(input_device(self._model))
            with (
                torch.inference_mode(),
                observed_attention(self._model, lambda call: None, approximator),
                self._exact_runs.of(sequence, tokens, prompt, self._decoding) as exactly,
            ):
                approximator.start([sequence], prompt)
                nll, kl = likelihoods(self._model, tokens, prompt, exactly, decoding=self._decoding)
            assert kl is not None
            counted = slice(self._first, -1)  # the last position predicts nothing
            before = self._exact.nll(sequence)[counted].astype(np.float64)
            after, apart = (figures[0, counted].double().numpy() for figures in (nll, kl))
            yield float(before.sum()), float(after.sum()), float(apart.sum()), len(before)


def _cost(sums: np.ndarray[Any, Any]) -> dict[str, float]:
    """What a method costs, from the sums of each sequence (sequences, 4)."""
    exact, approximate, divergence, tokens = sums.T
    low, high = interval_of_mean(approximate - exact, tokens)
    return {
        "perplexity": float(np.exp(approximate.sum() / tokens.sum())),
        "exact_perplexity": float(np.exp(exact.sum() / tokens.sum())),
        "difference": float((approximate - exact).sum() / tokens.sum()),
        "low": low,
        "high": high,
        "kl": float(divergence.sum() / tokens.sum()),
    }


def _figures(replayed: Results, method: str, k: int) -> dict[str, float]:
    """Replay's figures of a method at a budget, means over layers and heads."""
    rows = replayed.metrics
    rows = rows[(rows["method"] == method) & (rows["topk"] == k)]
    means = rows.groupby("metric")["mean"].mean()
    return {name: float(means[name]) for name in (*FIGURES, *AT_BLOCKS) if name in means}
