"""`evaluate_tasks`: what methods in the loop cost a model in tasks of lm-eval-harness."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from retrace.analyze import parse_specs
from retrace.analyze.arguments import choose_calibration
from retrace.analyze.methods.specs import Methods, MethodSpec, PlanSpec
from retrace.analyze.replay.approximation import check_exact
from retrace.analyze.replay.kept import (
    made_now,
    note_kept,
    outdated_among,
    outdated_besides,
    when_made,
)
from retrace.analyze.storage.provenance import ENGINE, code_digest
from retrace.analyze.tables.saved import SAVING, names_in
from retrace.capture.attention.recorder import AttentionLayer
from retrace.capture.checks.method import check_method
from retrace.capture.checks.runs import check_loop
from retrace.capture.checks.trace import examine
from retrace.capture.loop.approximate import Approximator, prepare
from retrace.capture.model.arguments import which_model
from retrace.capture.model.loading import (
    Checkpoint,
    check_vocabulary,
    open_checkpoint,
    quiet_libraries,
)
from retrace.capture.model.logits import Decoding
from retrace.capture.reading.harness import Harness
from retrace.capture.reading.sequences import like_reference, read_text
from retrace.capture.recording.identity import check_same_model, weights_digest
from retrace.capture.settings import DEFAULT_MAX_LENGTH, TASKS, CaptureSettings
from retrace.capture.tables.task_evaluation import EXACT, PLACE, POINT, TaskEvaluation
from retrace.traces import PHASES, Location, RetraceError, Trace, noted, open_trace
from retrace.traces.progress import ShowStage
from retrace.traces.storage.lock import LOCK, check_files, check_leave, one_at_a_time


@one_at_a_time
def evaluate_tasks(
    methods: Methods,
    topk: Sequence[int],
    *,
    tasks: Sequence[str],
    pretrained: str = "",
    exact: Trace | str | Location | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    from_position: int | None = None,
    dense_layers: Sequence[int] = (),
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | Path | Mapping[str, Any] | None = None,
    model_args: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    again: bool = False,
    progress: ShowStage | None = None,
) -> TaskEvaluation:
    """Score a model in tasks of lm-eval-harness, exactly and with methods in the loop.

    Answers that a task scores are read with their context at once, all attention being the
    method's, or that from `from_position` on. Answers that the model writes are decoded with the
    method; the prompt is read exactly.

    Args:
        methods: as in `analyze`.
        topk: budgets: keys per query and head.
        tasks: names of tasks or groups of lm-eval-harness.
        pretrained: the model, as `capture` takes it; by default that of `exact`.
        exact: a trace of the model's exact run, which methods that learn do so from.
        include_path: folder of further task files (.yaml).
        num_fewshot: solved examples before each document; by default what the task says.
        limit: documents of each task; all of them by default.
        max_length: positions that the model reads at most, longer texts losing their beginning;
            by default as many as it was made for.
        from_position: positions before it attend exactly.
        dense_layers: layers that attend exactly.
        dtype: type that the model computes in; auto is the checkpoint's own.
        device: device of the model: `auto`, `cpu`, `cuda`, `cuda:N`.
        device_map: how the model is spread over devices, as `capture` takes it.
        model_args: further arguments of the model, as `capture` takes them.
        revision: branch, tag or commit of a model on the Hub.
        trust_remote_code: run the Python code that a model brings along.
        out: folder for the scores. Points that it holds already are not run again, as long as they
            come from the same code.
        overwrite: throw away what is in `out`.
        again: run these methods again at every budget that `out` holds or that is asked for.
        progress: told how far it is.

    Raises:
        RetraceError: anything the user can mend.
    """
    if exact is not None:
        if pretrained:
            raise RetraceError("The trace says which model it is of: leave pretrained out.")
        exact = exact if isinstance(exact, Trace) else open_trace(exact)
        check_exact(exact)
    specs, _ = parse_specs(methods)
    budgets = sorted(set(topk))
    if not budgets and not all(isinstance(spec, PlanSpec) for spec in specs):
        raise RetraceError("How many keys may a method attend? Say so with topk.")
    own = [name for name in tasks if name in TASKS]
    if own:
        raise RetraceError(
            f"{own[0]} is no task that lm-eval-harness scores: capture a trace of it, and evaluate "
            "that."
        )
    if not tasks:
        raise RetraceError("Nothing to score: name a task of lm-eval-harness, such as hellaswag.")
    learns = [str(spec) for spec in specs if spec.method.calibrated]
    if learns and exact is None:
        raise RetraceError(
            f"{learns[0]} learns from a trace before it can take part: name one of the same model."
        )
    settings = CaptureSettings(
        pretrained=pretrained or _model_of(exact),
        tasks=tasks,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        max_length=max_length,
        approximate=str(specs[0]),
        topk=min(budgets, default=1),
        from_position=from_position,
        dense_layers=dense_layers,
        dtype=dtype,
        device=device,
        device_map=device_map,
        model_args=model_args,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    settings = settings if exact is None else like_reference(exact, settings)
    facts = {
        "model": settings.pretrained,
        "revision": settings.revision,
        "dtype": settings.dtype,
        "model_args": which_model(settings.arguments) or None,
        "tasks": list(tasks),
        "num_fewshot": num_fewshot,
        "limit": limit,
        "max_length": max_length,
        "from_position": from_position,
        "dense_layers": sorted(set(dense_layers)),
        "calibration": _calibration(exact) if learns and exact is not None else None,
        "retrace": version("retrace-attention"),
        "lm_eval": version("lm_eval"),
    }
    folder = None if out is None else Path(out)
    found = _earlier(folder, facts, overwrite)
    check_files(folder, TaskEvaluation.files())
    context = from_position or max_length or DEFAULT_MAX_LENGTH
    asked = {str(spec): spec.budgets(budgets, context) for spec in specs}
    found, points = _still_good(found, specs, asked, again)
    wanted = [(spec, k) for spec, k in points if not found.has(_name(spec), k)]
    if wanted:
        check_leave(folder)
    show = progress or (lambda *_: None)
    with quiet_libraries():
        show("Loading model and tasks", 0, 1)
        harness = Harness(settings) if wanted else None
        checkpoint = open_checkpoint(settings)
        # Also where nothing is left to run: scores of a model that has changed are not its own.
        model = checkpoint.load(settings.dtype, settings.device)
        weights = weights_digest(model)
        if exact is not None and settings.dtype == exact.attributes["dtype"]:
            check_same_model(exact, model, weights, settings.pretrained)
        found = _of_weights(found, weights, folder)
        if harness is None:
            return found
        scorer = _Scorer(settings, exact, harness, checkpoint, model)
        show("Loading model and tasks", 1, 1)
        for spec, k in wanted:
            scored = scorer.score(spec, k, show)
            found = found.extended(_name(spec), k, scored)
            noted = found.facts["methods"]
            made = made_now(_made_by(spec), k, noted.get(_name(spec), {}))
            found = dataclasses.replace(
                found, facts={**found.facts, **facts, "methods": {**noted, _name(spec): made}}
            )
            if folder is not None:
                found.save(folder)
    return found


def _made_by(spec: MethodSpec | None) -> dict[str, str | None]:
    """What scores of a method, or of exact attention, come from besides what all of them share."""
    return {
        "code": EXACT if spec is None else spec.code.digest,
        "engine": code_digest(__name__, *ENGINE),
    }


def _still_good(
    found: TaskEvaluation,
    specs: Sequence[MethodSpec],
    budgets: Mapping[str, Sequence[int]],
    again: bool,
) -> tuple[TaskEvaluation, list[tuple[MethodSpec | None, int]]]:
    """The scores that the code of now would give too, and all points that are wanted."""
    noted = found.facts.get("methods", {})
    known = {method: noted.get(method, {}) for method in found.scores["method"].unique()}
    asked: dict[str, MethodSpec | None] = {EXACT: None, **{str(spec): spec for spec in specs}}
    outdated = outdated_among({name: _made_by(spec) for name, spec in asked.items()}, known)
    chosen = [name for name in asked if name != EXACT]
    points: list[tuple[MethodSpec | None, int]] = [(None, 0)]
    for name in chosen:
        held = set(map(int, found.scores.loc[found.scores["method"] == name, "topk"]))
        ks = {*budgets[name], *held} if again else set(budgets[name])
        points += [(asked[name], k) for k in sorted(ks)]
    found = found.without({*outdated, *chosen} if again else outdated)
    note_kept(
        (name, k, when_made(known[name], k))
        for name, k in ((_name(spec), k) for spec, k in points)
        if name != EXACT and found.has(name, k)
    )
    known.pop(EXACT, None)
    others = outdated_besides(specs, known, _made_by, code_digest(__name__, *ENGINE))
    facts = {**found.facts, "methods": noted, "outdated": others}
    return dataclasses.replace(found, facts=facts), points


def _name(spec: MethodSpec | None) -> str:
    return EXACT if spec is None else str(spec)


def _model_of(exact: Trace | None) -> str:
    return "" if exact is None else str(noted(exact, "model.pretrained", str))


def _calibration(exact: Trace) -> list[str]:
    """What the sequences that methods learn from hold."""
    return [exact.digest(s) for s in choose_calibration(exact, None)]


def _earlier(folder: Path | None, facts: dict[str, Any], overwrite: bool) -> TaskEvaluation:
    """The scores that the folder holds; none where there is nothing."""
    none = TaskEvaluation(
        pd.DataFrame(columns=[*POINT, *PLACE, "value"]),
        pd.DataFrame(columns=[*POINT, *PLACE, "document", "value"]),
        facts,
    )
    if folder is None or not folder.is_dir():
        return none
    there, scores = names_in(folder), "scores.parquet"
    begun = {name.removesuffix(".partial") for name in there - {LOCK, SAVING}}
    if begun <= {*TaskEvaluation.files()} and not {scores, "scores.json"} <= there:
        return none  # empty, or of a run that ended before its first scores were whole
    if scores not in there:
        raise RetraceError(
            f"{folder} is not empty, and holds no scores of retrace: choose another with --out."
        )
    if overwrite:
        return none
    found = TaskEvaluation.load(folder)
    different = [
        name
        for name in facts
        if name not in ("retrace", "lm_eval") and found.facts.get(name) != facts[name]
    ]
    if different:
        raise RetraceError(
            f"{folder} holds scores of another {' and '.join(different)}: choose another folder "
            "with --out, or replace it with --overwrite."
        )
    return found


def _of_weights(found: TaskEvaluation, weights: str, folder: Path | None) -> TaskEvaluation:
    """Scores with the digest of the weights that they are of, refused if those are others."""
    known = found.facts.get("weights")
    if found.scores.empty or known == weights:
        return dataclasses.replace(found, facts=found.facts | {"weights": weights})
    what = "does not say which weights its scores are of"
    if known is not None:
        what = "holds scores of other weights: the model has changed since"
    raise RetraceError(
        f"{folder} {what}. Choose another folder with --out, or replace it with --overwrite."
    )


class _Scorer:
    """A model that lm-eval-harness scores with one method after another."""

    def __init__(
        self,
        settings: CaptureSettings,
        exact: Trace | None,
        harness: Harness,
        checkpoint: Checkpoint,
        model: Any,
    ) -> None:
        from retrace.capture.loop.harness_model import HarnessModel

        self._exact = exact
        self._harness = harness
        most = settings.max_length or checkpoint.max_positions or DEFAULT_MAX_LENGTH
        self._settings = dataclasses.replace(settings, max_length=most)
        reading = read_text(self._settings, checkpoint, self._harness)
        check_vocabulary(model, reading.tokens)
        self._model = HarnessModel(model, checkpoint.tokenizer, most)
        self._longest = longest = max(reading.tokens, key=len)
        # What will be generated is not known yet, but any tokens will do.
        length = min(len(longest) + self._model.max_gen_toks, most)
        self._layers: dict[int, AttentionLayer] = dict(examine(model, np.resize(longest, length)))
        self._decodes = any(phase[-1] == PHASES["context"] for phase in reading.phases)
        # lm-eval-harness decodes by the model's own `generate`.
        check_loop(
            model,
            self._layers,
            longest,
            decoding=Decoding.ways(model)[0] if self._decodes else None,
        )

    def score(self, spec: MethodSpec | None, k: int, show: ShowStage) -> dict[str, Any]:
        """What lm-eval-harness finds with a method in the loop, or with none."""
        label = _name(spec) if spec is None else f"{spec}, {k}"
        self._model.progress = lambda done, total: show(label, done, total)
        self._model.approximator = None
        if spec is not None:
            settings = dataclasses.replace(self._settings, approximate=str(spec), topk=k)
            approximation = prepare(spec, settings, self._layers, self._exact)
            check_method(
                self._model.model, self._layers, approximation, self._longest, decodes=self._decodes
            )
            self._model.approximator = Approximator(approximation, self._layers)
        return self._harness.score(self._model)
