"""Capturing a trace, from the settings to the finished store."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from retrace.capture.check import check_stored, examine, sampled_positions
from retrace.capture.decode import StepRecorder, continue_sequences
from retrace.capture.harness import Harness
from retrace.capture.interface import observed_attention
from retrace.capture.likelihood import next_token_nll
from retrace.capture.models import (
    Checkpoint,
    find_device,
    input_device,
    open_checkpoint,
    quiet_libraries,
)
from retrace.capture.output import Output
from retrace.capture.queries import parse_queries
from retrace.capture.queue import WriteQueue
from retrace.capture.ranks import Meeting, Ranks
from retrace.capture.recorder import AttentionLayer, RecordedSequence, TensorRecorder
from retrace.capture.settings import DEFAULT_MAX_LENGTH, CaptureSettings
from retrace.capture.tasks import SequenceSet, WindowCutter, read_sequences
from retrace.traces import (
    PHASES,
    LayerRules,
    Location,
    RetraceError,
    Trace,
    TraceWriter,
    create_trace,
    locate,
    open_trace,
    resume_trace,
    tensor_bytes,
)

PACKAGES = ("retrace-attention", "torch", "transformers", "datasets", "zarr", "numpy")
COMPARED = ("model", "tokenizer", "task", "capture")
"""Attributes that a capture must have in common with the one that it resumes."""


@dataclass(frozen=True)
class Progress:
    """How far a capture has come."""

    stage: Literal["loading", "checking", "recording"]
    """Loading the model and the text, checking that it can be recorded, or recording."""
    sequences: int = 0
    """Sequences that are finished, those of an interrupted capture included."""
    total_sequences: int = 0
    tokens: int = 0
    """Tokens of the finished sequences."""
    total_tokens: int = 0
    bytes: int = 0
    """Bytes of queries, keys and values that the trace holds so far."""
    total_bytes: int = 0


ShowProgress = Callable[[Progress], None]


def capture(
    pretrained: str,
    *,
    tasks: Sequence[str] = (),
    text: Sequence[str | Path] = (),
    data: str | Path | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    generate: int = 0,
    batch_size: int = 1,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    layers: Sequence[int] | None = None,
    queries: str = "all",
    revision: str | None = None,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    command: str | None = None,
    progress: ShowProgress | None = None,
) -> Trace:
    """Run a model over text and store every layer's queries, keys and values in a trace.

    The arguments are the fields of `CaptureSettings`, which says what each means; besides:

    Args:
        command: what the user typed, to be noted in the trace.
        progress: called with a `Progress` whenever there is some.

    Returns:
        The finished trace.

    Raises:
        RetraceError: what was asked for cannot be done; one line says why, and the cure.
    """
    settings = CaptureSettings(
        pretrained=pretrained,
        tasks=tasks,
        text=text,
        data=data,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        generate=generate,
        batch_size=batch_size,
        max_length=max_length,
        dtype=dtype,
        device=device,
        layers=layers,
        queries=queries,
        revision=revision,
        trust_remote_code=trust_remote_code,
        out=out,
        overwrite=overwrite,
        resume=resume,
    )
    ranks = Ranks.from_environment()
    settings = dataclasses.replace(settings, device=ranks.device(device))
    find_device(settings.device)  # refuses one that is not there
    show = progress or (lambda progress: None)
    with quiet_libraries(), ranks.connected() as meeting:
        if ranks.first:
            output = Output(settings.output(), overwrite=overwrite, resume=resume)
        else:
            output = Output.joined(settings.output(), settings.output())
        return _capture(settings, output, meeting, command, show)


@dataclass(frozen=True)
class _Plan:
    """Everything that a trace holds but the tensors."""

    rules: dict[int, LayerRules]
    tokens: list[npt.NDArray[np.int32]]
    phases: list[npt.NDArray[np.int8]]
    query_positions: list[npt.NDArray[np.int32]]
    dtype: str
    attributes: dict[str, Any]

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


def _capture(
    settings: CaptureSettings,
    output: Output,
    meeting: Meeting,
    command: str | None,
    show: ShowProgress,
) -> Trace:
    show(Progress("loading"))
    harness = Harness(settings) if settings.harness_tasks() else None
    checkpoint = open_checkpoint(settings)
    max_length = _max_length(settings, checkpoint)
    cut = WindowCutter(checkpoint.tokenizer, max_length - settings.generate, settings.limit)
    sets = read_sequences(settings, cut, harness)
    with _explained(output):
        model = checkpoint.load(settings.dtype, settings.device)
        show(Progress("checking"))
        tokens = [sequence for one in sets for sequence in one.sequences]
        phases = [phase for one in sets for phase in one.phases()]
        # The longest shows what shorter ones hide: a window, say. What will be generated is not
        # known yet, but any tokens will do.
        longest = max(tokens, key=len)
        most = min(len(longest) + settings.generate, max_length)
        layers = examine(model, np.resize(longest, most))
        recorded = _choose(layers, settings)
        attributes = _describe(settings, checkpoint, model, sets, cut, layers, max_length)
        attributes |= {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
        }
        if not meeting.ranks.first:
            # Afterwards, so that what is generated is generated once, and read from the trace.
            output = Output.joined(output.path, locate(meeting.hear("begun")["writing"]))
        if settings.generate:
            tokens, phases = continue_sequences(
                model,
                tokens,
                phases,
                settings.generate,
                written=open_trace(output.writing) if output.resumes else None,
            )
        select = parse_queries(settings.queries)
        plan = _Plan(
            rules={index: layer.rules for index, layer in recorded.items()},
            tokens=tokens,
            phases=phases,
            query_positions=[select.positions(len(p), _prompt(p)) for p in phases],
            dtype=str(next(iter(recorded.values())).dtype).removeprefix("torch."),
            attributes=attributes,
        )
        return _record(settings, output, meeting, plan, model, recorded, show)


@contextlib.contextmanager
def _explained(output: Output) -> Iterator[None]:
    """A full memory or disk, as one line that says how to go on."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RetraceError(
            "The device has too little memory: lower --batch-size or --max-length, or choose "
            "another --dtype or --device."
        ) from error
    except OSError as error:
        explanation = output.explain(error)
        if explanation is None:
            raise
        raise explanation from error


def _record(
    settings: CaptureSettings,
    output: Output,
    meeting: Meeting,
    plan: _Plan,
    model: Any,
    layers: Mapping[int, AttentionLayer],
    show: ShowProgress,
) -> Trace:
    """Run the model over every sequence that the trace does not hold yet."""
    count = len(plan.tokens)
    if meeting.ranks.first:
        if not output.resumes:
            output.clear()
        done = set(open_trace(output.writing).sequences) if output.resumes else set()
        output.check_space(plan.bytes() * (count - len(done)) // count)
        writer = plan.open(output)
        meeting.tell("begun", {"writing": str(output.writing), "done": sorted(done)})
    else:
        done = set(meeting.hear("begun")["done"])
        writer = plan.open(output)
    show(_progress(plan, done))
    # Caches of sequences of different lengths would need padding: those are read one by one.
    batch_size = 1 if settings.generate else settings.batch_size
    recorder_class = StepRecorder if settings.generate else TensorRecorder
    try:
        with (
            WriteQueue(writer) as queue,
            torch.inference_mode(),
            observed_attention(model, recorder := recorder_class(queue, layers)),
        ):
            before: list[int] = []
            # Batches stay whole and go round the ranks: each computes what one alone would.
            batches = _pending_batches(batch_size, count, done)
            for batch in batches[meeting.ranks.rank :: meeting.ranks.size]:
                meeting.check()
                first = not before
                parts = _missing_parts(plan, batch, done, layers if first else None)
                nll = _run_batch(model, recorder, plan, batch, parts)
                if first:
                    queue.drain()
                    _check_first(output.writing, parts[0], recorder)
                else:
                    # One batch is written while the next is computed.
                    queue.wait_for(before)
                    done.update(before)
                    show(_progress(plan, done))
                for part in parts:
                    queue.finish_sequence(part.sequence, nll[part.row, : part.length])
                before = [part.sequence for part in parts]
            queue.wait_for(before)
            done.update(before)
            if before:
                show(_progress(plan, done))
    except RetraceError:
        alone = meeting.ranks.size == 1
        if alone and not output.resumes and not open_trace(output.writing).sequences:
            output.discard()
        raise
    if not meeting.ranks.first:
        meeting.tell(f"written {meeting.ranks.rank}")
        meeting.hear("complete")
        return open_trace(output.path)
    while len(done) < count:  # what the other ranks have not finished yet
        meeting.pause(progress=len(done))
        done = set(open_trace(output.writing).sequences)
        show(_progress(plan, done))
    for rank in range(1, meeting.ranks.size):
        meeting.hear(f"written {rank}")
    writer.close()
    output.complete()
    meeting.tell("complete")
    return open_trace(output.path)


def _prompt(phase: npt.NDArray[np.int8]) -> int:
    """Positions of a sequence (positions,) before what is scored or generated."""
    return int((phase == PHASES["context"]).sum())


def _pending_batches(size: int, count: int, done: set[int]) -> list[range]:
    """The batches of a capture that hold a sequence which is not done.

    A batch is run again as it was though some of it be done: results must not depend, by a
    rounding, on where a capture was interrupted.
    """
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return [batch for batch in batches if not done.issuperset(batch)]


def _missing_parts(
    plan: _Plan,
    batch: range,
    done: set[int],
    to_check: Mapping[int, AttentionLayer] | None,
) -> list[RecordedSequence]:
    """The sequences of a batch that are not done; of the first, what is `to_check`, is sampled."""
    parts: list[RecordedSequence] = []
    for row, sequence in enumerate(batch):
        if sequence in done:
            continue
        kept = plan.query_positions[sequence]
        sampled = None
        if to_check is not None and not parts:
            sampled = sampled_positions(kept, to_check)
        parts.append(RecordedSequence(row, sequence, len(plan.tokens[sequence]), kept, sampled))
    return parts


def _run_batch(
    model: Any,
    recorder: TensorRecorder,
    plan: _Plan,
    batch: range,
    parts: Sequence[RecordedSequence],
) -> npt.NDArray[np.float32]:
    """Record one batch; its negative log-likelihoods (batch, positions)."""
    lengths = [len(plan.tokens[s]) for s in batch]
    # Padding on the right needs no mask: no position sees a later one. Any token will do.
    tokens = np.zeros((len(batch), max(lengths)), np.int64)
    for row, s in enumerate(batch):
        tokens[row, : lengths[row]] = plan.tokens[s]
    recorder.start(parts)
    prompt = int((plan.phases[batch[0]] != PHASES["generated"]).sum()) if len(batch) == 1 else None
    nll = next_token_nll(model, torch.from_numpy(tokens).to(input_device(model)), prompt)
    recorder.finish()
    for row, length in enumerate(lengths):
        nll[row, length - 1 :] = torch.nan
    for part in parts:
        if not bool(torch.isfinite(nll[part.row, : part.length - 1]).all()):
            raise RetraceError(
                f"The model's likelihoods are not finite in sequence {part.sequence}: try another "
                "--dtype."
            )
    likelihoods: npt.NDArray[np.float32] = nll.numpy()
    return likelihoods


def _check_first(path: Location, part: RecordedSequence, recorder: TensorRecorder) -> None:
    assert part.sampled_positions is not None
    check_stored(open_trace(path), part.sequence, part.sampled_positions, recorder.samples)


def _progress(plan: _Plan, done: set[int]) -> Progress:
    lengths = [len(t) for t in plan.tokens]
    return Progress(
        "recording",
        sequences=len(done),
        total_sequences=len(lengths),
        tokens=sum(lengths[s] for s in done),
        total_tokens=sum(lengths),
        bytes=plan.bytes() * len(done) // len(lengths),
        total_bytes=plan.bytes(),
    )


def _max_length(settings: CaptureSettings, checkpoint: Checkpoint) -> int:
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


def _choose(
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


def _describe(
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
