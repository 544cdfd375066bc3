"""What the model reads: sequences of tokens from tasks and texts, or those of another trace."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrace.capture.model.arguments import which_model
from retrace.capture.model.loading import Checkpoint
from retrace.capture.reading.harness import Harness
from retrace.capture.reading.tasks import read_sequences
from retrace.capture.reading.windows import WindowCutter
from retrace.capture.settings import DEFAULT_MAX_LENGTH, CaptureSettings
from retrace.traces import PHASES, Marks, RetraceError, Trace, noted


@dataclass(frozen=True)
class Reading:
    """Sequences of tokens, and where they are from."""

    tokens: list[npt.NDArray[np.int32]]
    """Token ids (positions,) of each sequence."""
    phases: list[npt.NDArray[np.int8]]
    """What each position (positions,) of each sequence is, a code in `PHASES`."""
    marks: list[Marks]
    """Named spans of positions of each sequence."""
    task: list[dict[str, Any]]
    """Each task or text with its source, as the trace's attributes have it."""
    max_length: int
    """Positions of the longest sequence that there may be."""
    begins: dict[str, Any]
    """What every window of a text begins with, as the attributes of the trace's tokenizer have it:
    the tokens of the `prefix` (older traces do not say), and whether BOS is among them."""


def read_text(
    settings: CaptureSettings, checkpoint: Checkpoint, harness: Harness | None
) -> Reading:
    """The sequences of the tasks and texts that the settings name."""
    max_length = longest_sequence(settings, checkpoint)
    cut = WindowCutter(checkpoint.tokenizer, max_length - settings.generate, settings.limit)
    sets = read_sequences(settings, cut, harness)
    return Reading(
        [sequence for one in sets for sequence in one.sequences],
        [phase for one in sets for phase in one.phases()],
        [marks for one in sets for marks in one.marks or [{}] * len(one.sequences)],
        [
            {"task": one.task, "source": one.source, "sequences": len(one.sequences)}
            | ({} if one.num_fewshot is None else {"num_fewshot": one.num_fewshot})
            | dict(one.facts)
            for one in sets
        ],
        max_length,
        {
            "starts_with_bos": checkpoint.tokenizer.bos_token_id in cut.prefix,
            "prefix": checkpoint.tokenizer.convert_ids_to_tokens(cut.prefix),
        },
    )


def like_reference(reference: Trace, settings: CaptureSettings) -> CaptureSettings:
    """The settings, what they do not say being as it was in the reference.

    Of another model nothing is taken over that says which one it is. A device map is, unless a
    device is named: what did not fit onto one will not now.
    """
    unsaid: dict[str, Any] = {}
    other = settings.pretrained not in ("", noted(reference, "model.pretrained", str))
    for path, kind in (
        ("model.pretrained", str),
        ("model.revision", str | None),
        ("dtype", str),
        ("batch_size", int),
        ("capture.layers", list[int] | None),
        ("capture.queries", str),
    ):
        name = path.rpartition(".")[2]
        if other and path.startswith("model."):
            continue
        if getattr(settings, name) == getattr(CaptureSettings, name):
            unsaid[name] = noted(reference, path, kind)
    if not other and not which_model(settings.arguments):
        unsaid["model_args"] = _arguments(reference) | settings.arguments
    if settings.device_map is None and settings.device == "auto":
        unsaid["device_map"] = _noted_or_none(reference, "device_map", str | dict[str, Any] | None)
    return dataclasses.replace(settings, **unsaid)


def meant_as_there(reference: Trace, settings: CaptureSettings) -> bool:
    """Whether the model is to be the reference's own: where a method takes part, since what it
    costs is the difference between the two, and where no other is named."""
    named = (
        ("model.pretrained", settings.pretrained),
        ("model.revision", settings.revision),
        ("dtype", settings.dtype),
    )
    if settings.approximate is not None:
        return True
    return which_model(settings.arguments) == _arguments(reference) and all(
        noted(reference, path, str | None) == value for path, value in named
    )


def _arguments(reference: Trace) -> dict[str, Any]:
    """The arguments of the reference's model; none in traces that do not say."""
    found = _noted_or_none(reference, "model.arguments", dict[str, Any])
    return dict(found or {})


def _noted_or_none(reference: Trace, path: str, kind: Any) -> Any:
    """An attribute that some traces do not have."""
    held: Any = reference.attributes
    *within, name = path.split(".")
    for one in within:
        held = held.get(one) if isinstance(held, Mapping) else None
    there = isinstance(held, Mapping) and name in held
    return noted(reference, path, kind) if there else None


def read_reference(trace: Trace, limit: int | None) -> Reading:
    """The sequences of a trace, or the first `limit` of them."""
    if len(trace.sequences) < trace.planned:
        raise RetraceError(
            f"{trace.path} is not complete, and so no reference: go on with its capture first "
            "(--resume)."
        )
    sequences = trace.sequences[:limit]
    begins = {"starts_with_bos": noted(trace, "tokenizer.starts_with_bos", bool)}
    if "prefix" in noted(trace, "tokenizer", dict[str, Any]):
        begins["prefix"] = noted(trace, "tokenizer.prefix", list[str])
    return Reading(
        [trace.tokens(sequence) for sequence in sequences],
        [trace.phase(sequence) for sequence in sequences],
        [trace.marks(sequence) for sequence in sequences],
        noted(trace, "task", list[dict[str, Any]]),
        noted(trace, "capture.max_length", int),
        begins,
    )


def longest_sequence(settings: CaptureSettings, checkpoint: Checkpoint) -> int:
    """Positions of the longest sequence, generated tokens included."""
    most = checkpoint.max_positions
    told = settings.told_lengths()
    # Tasks that are told a length leave room in it for an answer, but seldom for a long one.
    wanted = max(told, default=DEFAULT_MAX_LENGTH - settings.generate) + settings.generate
    length = settings.max_length or min(wanted, most or wanted)
    if length - settings.generate < 2:
        raise RetraceError(
            f"max_length is {length}, generated tokens included: generate cannot be "
            f"{settings.generate}."
        )
    needed = max([*told, *(n + settings.generate for n in settings.lengths)], default=0)
    if needed > length:
        limit = f"max_length is {length}"
        if settings.max_length is None:
            limit = f"{settings.pretrained} reads {most} positions at most"
        raise RetraceError(
            f"Prompts are to have {needed} tokens, what is generated included, and {limit}."
        )
    if settings.max_length is None:
        return length
    if most is not None and settings.max_length > most:
        raise RetraceError(
            f"{settings.pretrained} reads {most} positions at most: max_length cannot be "
            f"{settings.max_length}."
        )
    return settings.max_length


def prompt_length(phase: npt.NDArray[np.int8]) -> int:
    """Positions of a sequence (positions,) before what is scored or generated."""
    return int((phase == PHASES["context"]).sum())
