"""What a capture will hold, settled before anything is recorded."""

import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from retrace.analyze.replay.approximation import Approximation
from retrace.capture.attention.recorder import AttentionLayer
from retrace.capture.model.arguments import which_model
from retrace.capture.model.loading import Checkpoint, input_device
from retrace.capture.reading.sequences import Reading
from retrace.capture.recording.sampling import Sampling
from retrace.capture.settings import CaptureSettings
from retrace.traces import (
    LayerRules,
    Marks,
    OutputProjection,
    RetraceError,
    Trace,
    TraceWriter,
    bundle_size,
    create_trace,
    prompts,
    resume_trace,
    tensor_bytes,
)
from retrace.traces.output import Output
from retrace.traces.schema import DTYPES

PACKAGES = ("retrace-attention", "torch", "transformers", "datasets", "zarr", "numpy")
COMPARED = ("model", "tokenizer", "task", "capture")
"""Attributes that a capture must have in common with the one that it resumes."""
UNSAID = {"model": ("weights",), "tokenizer": ("prefix",)}
"""What is in them that earlier versions did not say."""


@dataclass(frozen=True)
class CapturePlan:
    """Everything that a trace holds but the tensors."""

    rules: dict[int, LayerRules]
    projections: Mapping[int, OutputProjection | str]
    """The output projection of each layer, or why it has none that can be stored."""
    tokens: list[npt.NDArray[np.int32]]
    phases: list[npt.NDArray[np.int8]]
    marks: list[Marks]
    query_positions: list[npt.NDArray[np.int32]]
    dtype: str
    attributes: dict[str, Any]
    writing: Trace | None
    """The interrupted trace that is gone on with, where there is one."""

    @property
    def generates(self) -> bool:
        """Whether some positions are decoded one by one."""
        return self._prompts[0] is not None

    @property
    def approximates(self) -> bool:
        """Whether a method is in the loop."""
        return "approximation" in self.attributes["capture"]

    def prompt(self, sequence: int) -> int | None:
        """Positions of a sequence that are read at once, before any is decoded; None where the
        capture decodes nothing."""
        return self._prompts[sequence]

    @cached_property
    def _prompts(self) -> list[int | None]:
        return prompts(self.phases)

    @cached_property
    def bundle(self) -> int:
        """Sequences that share each shard: as many as in the trace that is gone on with."""
        if self.writing is not None:
            return self.writing.bundle
        count, positions = len(self.tokens), max(len(t) for t in self.tokens)
        return bundle_size(count, positions, self._tensor_bytes() // count)

    def bytes(self) -> int:
        """Bytes of the tensors, and of the output projections."""
        per_layer = (
            projection.hidden * self.rules[index].heads * self.rules[index].value_dim
            for index, projection in self.projections.items()
            if isinstance(projection, OutputProjection)
        )
        return self._tensor_bytes() + sum(per_layer) * DTYPES[self.dtype].itemsize

    def _tensor_bytes(self) -> int:
        return tensor_bytes(self.rules, self.tokens, self.query_positions, self.dtype)

    def open(self, output: Output) -> TraceWriter:
        """Begin the trace, or go on with one of the same plan."""
        everything = {
            "rules": self.rules,
            "tokens": self.tokens,
            "phases": self.phases,
            "marks": self.marks,
            "query_positions": self.query_positions,
            "dtype": self.dtype,
        }
        if self.writing is not None:
            there = self.writing.attributes
            compared = {name: self.attributes[name] for name in COMPARED}
            compared |= {name: _as_said(self.attributes, there, name) for name in UNSAID}
            return resume_trace(output.writing, attributes=compared, **everything)  # type: ignore[arg-type]
        return create_trace(
            output.writing,
            attributes=self.attributes,
            projections=self.projections,
            diverges=self.approximates,
            bundle=self.bundle,
            **everything,  # type: ignore[arg-type]
        )


def chosen_layers(
    layers: Mapping[int, AttentionLayer], wanted: Sequence[int] | None, model: str
) -> dict[int, AttentionLayer]:
    """The layers to record, ascending: all of them, or those `wanted` of the model of this name."""
    chosen = sorted(set(layers if wanted is None else wanted))
    missing = [index for index in chosen if index not in layers]
    if missing:
        raise RetraceError(
            f"{model} has no attention in layer {', '.join(map(str, missing))}; it has some in "
            f"{', '.join(map(str, layers))}."
        )
    return {index: layers[index] for index in chosen}


def describe(
    settings: CaptureSettings,
    checkpoint: Checkpoint,
    model: Any,
    reading: Reading,
    layers: Mapping[int, AttentionLayer],
    approximation: Approximation | None,
    weights: str,
) -> dict[str, Any]:
    """The trace's attributes, as JSON gives them back; `weights` is the digest of the model's."""
    tokenizer = checkpoint.tokenizer
    revision = checkpoint.commit or settings.revision
    attributes = model_attributes(model, layers, weights, settings.pretrained, revision) | {
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "vocabulary": len(tokenizer),
        }
        | reading.begins,
        "task": reading.task,
        "capture": {
            "limit": settings.limit,
            "max_length": reading.max_length,
            "layers": None if settings.layers is None else sorted(set(settings.layers)),
            "queries": settings.queries,
        }
        | ({"generate": settings.generate} if settings.generate else {})
        | _written(settings, tokenizer)
        | _prompted(settings)
        | ({"approximation": approximation.facts} if approximation else {}),
        "batch_size": settings.batch_size,
        "device_map": settings.spread,
    }
    if named := which_model(settings.arguments):
        attributes["model"]["arguments"] = named
    if checkpoint.adapter is not None:
        attributes["model"]["adapter"] = checkpoint.adapter.facts
    return as_json(attributes)


def model_attributes(
    model: Any,
    layers: Mapping[int, AttentionLayer],
    weights: str,
    pretrained: str,
    revision: str | None,
) -> dict[str, Any]:
    """What a trace says of its model: all `layers` that have attention, and the digest of its
    `weights`."""
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None) or max(layers) + 1
    return {
        "model": {
            "pretrained": pretrained,
            "revision": revision,
            "architecture": type(model).__name__,
            "model_type": model.config.model_type,
            "parameters": model.num_parameters(),  # of 4 bits, two are in a byte
            "layers": count,
            "weights": weights,
        },
        "unrecorded_layers": [i for i in range(count) if i not in layers],
        "position_encoding": getattr(config, "rope_parameters", None),
        "device": str(input_device(model)),
        "versions": {"python": sys.version.split()[0], **_versions()},
    }


def as_json(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(attributes, default=str))
    return plain


def _written(settings: CaptureSettings, tokenizer: Any) -> dict[str, Any]:
    """How generated tokens were chosen, where not the likeliest are to the end."""
    facts = Sampling.of(settings, tokenizer).facts()
    return {"sampling": facts} if facts else {}


def _prompted(settings: CaptureSettings) -> dict[str, Any]:
    """How prompts were put, where not as plain texts, and what tasks were told."""
    names = ("apply_chat_template", "system_instruction", "fewshot_as_multiturn", "metadata")
    given = {name: getattr(settings, name) for name in names}
    return {n: value for n, value in given.items() if value != getattr(CaptureSettings, n)}


def _as_said(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> Any:
    """An attribute of ours, less what theirs leaves unsaid."""
    said = theirs.get(name)
    return {
        key: value
        for key, value in ours[name].items()
        if key not in UNSAID[name] or not isinstance(said, Mapping) or key in said
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
