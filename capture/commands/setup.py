"""What `capture` and `estimate_capture` do first: settle what was asked for, load the model, and
check that it can be recorded."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrace.analyze.methods.specs import MethodSpec, PlanSpec, parse_spec
from retrace.analyze.replay.approximation import Approximation
from retrace.capture.attention.recorder import AttentionLayer, dtype_of
from retrace.capture.checks.method import check_method
from retrace.capture.checks.runs import check_decoding, check_loop
from retrace.capture.checks.trace import examine, examine_projections
from retrace.capture.loop.approximate import Approximator, prepare
from retrace.capture.model.loading import Checkpoint, check_vocabulary, open_checkpoint
from retrace.capture.model.logits import Decoding
from retrace.capture.model.placement import find_device
from retrace.capture.reading.harness import Harness
from retrace.capture.reading.sequences import (
    Reading,
    like_reference,
    meant_as_there,
    prompt_length,
    read_reference,
    read_text,
)
from retrace.capture.recording.identity import check_same_model, weights_digest
from retrace.capture.recording.plan import CapturePlan, chosen_layers
from retrace.capture.recording.ranks import Ranks
from retrace.capture.recording.record import Progress, ShowProgress
from retrace.capture.settings import CaptureSettings
from retrace.traces import OutputProjection, RetraceError, Trace, open_trace, prompts
from retrace.traces.queries import parse_queries


@dataclass(frozen=True)
class Asked:
    """What a capture is asked to do, completed by what its reference says."""

    settings: CaptureSettings
    reference: Trace | None
    spec: MethodSpec | None
    ranks: Ranks


def settle(settings: CaptureSettings) -> Asked:
    """Complete the settings, and refuse a method, reference or device that is not there."""
    ranks = Ranks.from_environment()
    if ranks.size > 1 and settings.device_map is not None:
        raise RetraceError(
            "torchrun gives each process a GPU and a model of its own, and device_map spreads one "
            "model over all: start one process, or leave device_map out."
        )
    if settings.device_map is None:
        settings = dataclasses.replace(settings, device=ranks.device(settings.device))
    known = None if settings.reference is None else open_trace(settings.reference)
    settings = settings if known is None else like_reference(known, settings)
    spec = None if settings.approximate is None else parse_spec(settings.approximate)
    if isinstance(spec, PlanSpec) and settings.topk is not None:
        raise RetraceError(f"{settings.approximate} has budgets of its own: leave topk out.")
    find_device(settings.device)
    return Asked(settings, known, spec, ranks)


def read(asked: Asked, show: ShowProgress) -> tuple[Checkpoint, Reading]:
    """Find the model, and read what it is to read."""
    show(Progress("loading"))
    settings = asked.settings
    harness = Harness(settings) if settings.harness_tasks() else None
    checkpoint = open_checkpoint(settings)
    if asked.reference is None:
        return checkpoint, read_text(settings, checkpoint, harness)
    return checkpoint, read_reference(asked.reference, settings.limit)


@dataclass(frozen=True)
class Ready:
    """A model that is loaded and checked, and all that it is to read."""

    settings: CaptureSettings
    checkpoint: Checkpoint
    reading: Reading
    model: Any
    weights: str
    layers: dict[int, AttentionLayer]
    """All that have attention."""
    recorded: dict[int, AttentionLayer]
    projections: Mapping[int, OutputProjection | str]
    """Of the recorded layers."""
    decoding: Decoding
    approximation: Approximation | None

    @property
    def dtype(self) -> str:
        """What its attention computes in."""
        return dtype_of(self.layers)

    def approximator(self) -> Approximator | None:
        """What answers in place of exact attention, if something does."""
        if self.approximation is None:
            return None
        return Approximator(self.approximation, self.layers)

    def plan(
        self,
        tokens: Sequence[npt.NDArray[np.int32]],
        phases: Sequence[npt.NDArray[np.int8]],
        attributes: dict[str, Any],
        writing: Trace | None,
    ) -> CapturePlan:
        """The plan of a trace of these sequences, of tokens (positions,) and their phases."""
        select = parse_queries(self.settings.queries)
        return CapturePlan(
            rules={index: layer.rules for index, layer in self.recorded.items()},
            projections=self.projections,
            tokens=list(tokens),
            phases=list(phases),
            marks=self.reading.marks,
            query_positions=[select.positions(len(p), prompt_length(p)) for p in phases],
            dtype=self.dtype,
            attributes=attributes,
            writing=writing,
        )

    def batch_size(self, plan: CapturePlan) -> int:
        """Sequences that are read at once: caches of different lengths would need padding, so that
        those that are decoded are read one by one."""
        return 1 if plan.generates else self.settings.batch_size


def load_and_check(
    asked: Asked,
    checkpoint: Checkpoint,
    reading: Reading,
    resumed: Trace | None,
    show: ShowProgress,
) -> Ready:
    """Load the model and check that what it computes can be recorded.

    Args:
        asked: what was settled.
        checkpoint: its model, found.
        reading: what it is to read.
        resumed: the interrupted trace that is gone on with, which the model must be that of.
        show: told how far it is.

    Raises:
        RetraceError: the model is another one, or cannot be recorded.
    """
    settings = asked.settings
    model = checkpoint.load(settings.dtype, settings.device)
    show(Progress("checking"))
    tokens, phases = reading.tokens, reading.phases
    check_vocabulary(model, tokens)
    weights = weights_digest(model)
    if asked.reference is not None and meant_as_there(asked.reference, settings):
        check_same_model(asked.reference, model, weights, settings.pretrained)
    if resumed is not None:
        check_same_model(resumed, model, weights, settings.pretrained)
    # The longest shows what shorter ones hide: a window, say. What will be generated is not known
    # yet, but any tokens will do.
    longest = max(tokens, key=len)
    most = min(len(longest) + settings.generate, reading.max_length)
    layers = examine(model, np.resize(longest, most))
    recorded = chosen_layers(layers, settings.layers, settings.pretrained)
    projections = examine_projections(model, recorded, longest)
    decoding = check_decoding(
        model, tokens, phases, settings.generate, dtype_of(layers), reading.max_length
    )
    approximation = None
    if asked.spec is not None:
        approximation = prepare(asked.spec, settings, layers, asked.reference)
        decodes = settings.generate > 0 or prompts(phases)[0] is not None
        check_loop(model, layers, longest, decoding=decoding if decodes else None)
        check_method(model, layers, approximation, longest, decodes=decodes)
    return Ready(
        settings,
        checkpoint,
        reading,
        model,
        weights,
        layers,
        recorded,
        projections,
        decoding,
        approximation,
    )
