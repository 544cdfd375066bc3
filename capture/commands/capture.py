"""Capturing a trace, from the settings to the finished store."""

import contextlib
import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrace.capture.checks.runs import check_batch
from retrace.capture.commands.setup import Asked, load_and_check, read, settle
from retrace.capture.model.loading import quiet_libraries
from retrace.capture.recording.decode import continue_sequences
from retrace.capture.recording.plan import describe
from retrace.capture.recording.ranks import Meeting
from retrace.capture.recording.record import ShowProgress, batches_of, record
from retrace.capture.recording.sampling import Sampling
from retrace.capture.settings import CaptureSettings
from retrace.traces import RetraceError, Trace, UnreachableError, locate, open_trace
from retrace.traces.output import Output
from retrace.traces.storage.lock import locked


def capture(
    pretrained: str = "",
    *,
    reference: str | Path | None = None,
    tasks: Sequence[str] = (),
    text: Sequence[str | Path] = (),
    prompts: Sequence[str | Path] = (),
    data: str | Path | None = None,
    lengths: Sequence[int] = (),
    depths: Sequence[int] = (0, 25, 50, 75, 100),
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool | None = None,
    limit: int | None = None,
    generate: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch_size: int = 1,
    max_length: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | Path | Mapping[str, Any] | None = None,
    model_args: str | Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    queries: str = "all",
    approximate: str | None = None,
    topk: int | None = None,
    protocol: str | None = None,
    from_position: int | None = None,
    dense_layers: Sequence[int] = (),
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
        reference=reference,
        tasks=tasks,
        text=text,
        prompts=prompts,
        data=data,
        lengths=lengths,
        depths=depths,
        include_path=include_path,
        num_fewshot=num_fewshot,
        metadata=metadata,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        fewshot_as_multiturn=fewshot_as_multiturn,
        limit=limit,
        generate=generate,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
        batch_size=batch_size,
        max_length=max_length,
        dtype=dtype,
        device=device,
        device_map=device_map,
        model_args=model_args,
        layers=layers,
        queries=queries,
        approximate=approximate,
        topk=topk,
        protocol=protocol,
        from_position=from_position,
        dense_layers=dense_layers,
        revision=revision,
        trust_remote_code=trust_remote_code,
        out=out,
        overwrite=overwrite,
        resume=resume,
    )
    asked = settle(settings)
    settings, ranks = asked.settings, asked.ranks
    show = progress or (lambda progress: None)
    # The processes of one capture share its trace, and the first holds it for all.
    held = locked(settings.output()) if ranks.first else contextlib.nullcontext()
    with quiet_libraries(), ranks.connected() as meeting, held:
        if ranks.first:
            output = Output(settings.output(), overwrite=overwrite, resume=resume)
        else:
            output = Output.joined(settings.output(), settings.output())
        return _capture(asked, output, meeting, command, show)


def _capture(
    asked: Asked, output: Output, meeting: Meeting, command: str | None, show: ShowProgress
) -> Trace:
    settings = asked.settings
    checkpoint, reading = read(asked, show)
    with _explained(output):
        goes_on = meeting.ranks.first and output.resumes
        resumed = open_trace(output.writing) if goes_on else None
        ready = load_and_check(asked, checkpoint, reading, resumed, show)
        attributes = describe(
            settings,
            checkpoint,
            ready.model,
            reading,
            ready.layers,
            ready.approximation,
            ready.weights,
        )
        attributes |= {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
        }
        if not meeting.ranks.first:
            # Afterwards, so that what is generated is generated once, and read from the trace.
            output = Output.joined(output.path, locate(meeting.hear("begun")["writing"]))
        tokens, phases = reading.tokens, reading.phases
        written = open_trace(output.writing) if output.resumes else None
        if settings.generate:
            tokens, phases = continue_sequences(
                ready.model,
                tokens,
                phases,
                settings.generate,
                ready.decoding,
                Sampling.of(settings, checkpoint.tokenizer),
                written=written,
            )
        plan = ready.plan(tokens, phases, attributes, written)
        size = ready.batch_size(plan)
        batches = batches_of(ready.model, [len(t) for t in tokens], size, plan.bundle)
        mixed = max(batches, key=lambda batch: np.ptp([len(tokens[s]) for s in batch]))
        if len(mixed) > 1:
            check_batch(ready.model, [tokens[s] for s in mixed], ready.dtype)
        return record(
            ready.model,
            ready.recorded,
            plan,
            batches,
            ready.decoding,
            ready.approximator(),
            output,
            meeting,
            show,
        )


@contextlib.contextmanager
def _explained(output: Output) -> Iterator[None]:
    """A full memory or disk, or a store that is gone, as one line that says how to go on."""
    try:
        yield
    except UnreachableError as error:
        raise UnreachableError(
            f"{error} What is finished is kept: give the same command with --resume (without "
            "--overwrite)."
        ) from error
    except torch.OutOfMemoryError as error:
        raise RetraceError(
            "The device has too little memory: lower --batch-size or --max-length, choose "
            "another --dtype or --device, or spread the model (--device-map auto)."
        ) from error
    except OSError as error:
        explanation = output.explain(error)
        if explanation is None:
            raise
        raise explanation from error
