"""What a capture will hold, settled before anything is recorded."""

import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrace.capture.models import Checkpoint
from retrace.capture.output import Output
from retrace.capture.recorder import AttentionLayer
from retrace.capture.settings import DEFAULT_MAX_LENGTH, CaptureSettings
from retrace.capture.tasks import SequenceSet, WindowCutter
from retrace.traces import (
    PHASES,
    LayerRules,
    RetraceError,
    TraceWriter,
    create_trace,
    resume_trace,
    tensor_bytes,
)

PACKAGES = ("retrace-attention", "torch", "transformers", "datasets", "zarr", "numpy")
COMPARED = ("model", "tokenizer", "task", "capture")
"""Attributes that a capture must have in common with the one that it resumes."""


@dataclass(frozen=True)
class Plan:
    """Everything that a trace holds but the tensors."""

    rules: dict[int, LayerRules]
    tokens: list[npt.NDArray[np.int32]]
    phases: list[npt.NDArray[np.int8]]
    query_positions: list[npt.NDArray[np.int32]]
    dtype: str
    attributes: dict[str, Any]

    @property
    def generates(self) -> bool:
        """Whether some positions are decoded one by one."""
        return any(bool((phase == PHASES["generated"]).any()) for phase in self.phases)

    def read_at_once(self, sequence: int) -> int:
        """Positions of a sequence before the first that is decoded."""
        return int((self.phases[sequence] != PHASES["generated"]).sum())

    def bytes(self) -> int:
        """Bytes of the tensors."""
        return tensor_bytes(self.rules, self.tokens, self.query_positions, self.dtype)

    def open(self, output: Output) -> TraceWriter:
        """Begin the trace, or go on with one of the same plan."""
        everything = {
            "rules": self.rules,
            "tokens": self.tokens,
            "phases": self.phases,
            "query_positions": self.query_positions,
            "dtype": self.dtype,
        }
        if output.resumes:
            compared = {name: self.attributes[name] for name in COMPARED}
            return resume_trace(output.writing, attributes=compared, **everything)  # type: ignore[arg-type]
        return create_trace(output.writing, attributes=self.attributes, **everything)  # type: ignore[arg-type]


def longest_sequence(settings: CaptureSettings, checkpoint: Checkpoint) -> int:
    """Positions of the longest sequence, generated tokens included."""
    most = checkpoint.max_positions
    length = settings.max_length or min(DEFAULT_MAX_LENGTH, most or DEFAULT_MAX_LENGTH)
    if length - settings.generate < 2:
        raise RetraceError(
            f"max_length is {length}, generated tokens included: generate cannot be "
            f"{settings.generate}."
        )
    if settings.max_length is None:
        return length
    if most is not None and settings.max_length > most:
        raise RetraceError(
            f"{settings.pretrained} reads {most} positions at most: max_length cannot be "
            f"{settings.max_length}."
        )
    return settings.max_length


def recorded_layers(
    layers: Mapping[int, AttentionLayer], settings: CaptureSettings
) -> dict[int, AttentionLayer]:
    """The layers to record, ascending."""
    wanted = sorted(set(layers if settings.layers is None else settings.layers))
    missing = [index for index in wanted if index not in layers]
    if missing:
        raise RetraceError(
            f"{settings.pretrained} has no attention in layer {', '.join(map(str, missing))}; it "
            f"has some in {', '.join(map(str, layers))}."
        )
    return {index: layers[index] for index in wanted}


def describe(
    settings: CaptureSettings,
    checkpoint: Checkpoint,
    model: Any,
    sets: Sequence[SequenceSet],
    cut: WindowCutter,
    layers: Mapping[int, AttentionLayer],
    max_length: int,
) -> dict[str, Any]:
    """The trace's attributes, as JSON gives them back."""
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None) or max(layers) + 1
    tokenizer = checkpoint.tokenizer
    attributes = {
        "model": {
            "pretrained": settings.pretrained,
            "revision": getattr(checkpoint.config, "_commit_hash", None) or settings.revision,
            "architecture": type(model).__name__,
            "model_type": model.config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": count,
        },
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "vocabulary": len(tokenizer),
            "starts_with_bos": cut.starts_with_bos,
        },
        "task": [
            {"task": one.task, "source": one.source, "sequences": len(one.sequences)}
            | ({} if one.num_fewshot is None else {"num_fewshot": one.num_fewshot})
            for one in sets
        ],
        "capture": {
            "limit": settings.limit,
            "max_length": max_length,
            "layers": None if settings.layers is None else sorted(set(settings.layers)),
            "queries": settings.queries,
        }
        | ({"generate": settings.generate} if settings.generate else {}),
        "unrecorded_layers": [i for i in range(count) if i not in layers],
        "position_encoding": getattr(config, "rope_parameters", None),
        "batch_size": settings.batch_size,
        "device": str(model.device),
        "versions": {"python": sys.version.split()[0], **_versions()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(attributes, default=str))
    return plain


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def prompt_length(phase: npt.NDArray[np.int8]) -> int:
    """Positions of a sequence (positions,) before what is scored or generated."""
    return int((phase == PHASES["context"]).sum())
