"""Capturing a trace, from the settings to the finished store."""

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrace.analyze.methods.specs import MethodSpec, parse_spec
from retrace.capture.attention.recorder import dtype_of
from retrace.capture.checks.method import check_method
from retrace.capture.checks.runs import check_batch, check_decoding, check_loop
from retrace.capture.checks.trace import examine, examine_projections
from retrace.capture.loop.approximate import Approximator, prepare
from retrace.capture.model.loading import (
    check_vocabulary,
    open_checkpoint,
    quiet_libraries,
)
from retrace.capture.model.placement import find_device
from retrace.capture.reading.harness import Harness
from retrace.capture.reading.sequences import (
    like_reference,
    meant_as_there,
    prompt_length,
    read_reference,
    read_text,
)
from retrace.capture.recording.decode import continue_sequences
from retrace.capture.recording.identity import check_same_model, weights_digest
from retrace.capture.recording.plan import CapturePlan, chosen_layers, describe
from retrace.capture.recording.ranks import Meeting, Ranks
from retrace.capture.recording.record import Progress, ShowProgress, batches_of, record
from retrace.capture.recording.sampling import Sampling
from retrace.capture.settings import CaptureSettings
from retrace.traces import RetraceError, Trace, UnreachableError, locate, open_trace, prompts
from retrace.traces.output import Output
from retrace.traces.queries import parse_queries
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
        from_position=from_position,
        dense_layers=dense_layers,
        revision=revision,
        trust_remote_code=trust_remote_code,
        out=out,
        overwrite=overwrite,
        resume=resume,
    )
    known = None if settings.reference is None else open_trace(settings.reference)
    settings = settings if known is None else like_reference(known, settings)
    spec = None if settings.approximate is None else parse_spec(settings.approximate)
    ranks = Ranks.from_environment()
    if ranks.size > 1 and settings.device_map is not None:
        raise RetraceError(
            "torchrun gives each process a GPU and a model of its own, and device_map spreads one "
            "model over all: start one process, or leave device_map out."
        )
    settings = dataclasses.replace(settings, device=ranks.device(device))
    find_device(settings.device)  # refuses one that is not there
    show = progress or (lambda progress: None)
    # The processes of one capture share its trace, and the first holds it for all.
    held = locked(settings.output()) if ranks.first else contextlib.nullcontext()
    with quiet_libraries(), ranks.connected() as meeting, held:
        if ranks.first:
            output = Output(settings.output(), overwrite=overwrite, resume=resume)
        else:
            output = Output.joined(settings.output(), settings.output())
        return _capture(settings, known, spec, output, meeting, command, show)


def _capture(
    settings: CaptureSettings,
    reference: Trace | None,
    spec: MethodSpec | None,
    output: Output,
    meeting: Meeting,
    command: str | None,
    show: ShowProgress,
) -> Trace:
    show(Progress("loading"))
    harness = Harness(settings) if settings.harness_tasks() else None
    checkpoint = open_checkpoint(settings)
    if reference is None:
        reading = read_text(settings, checkpoint, harness)
    else:
        reading = read_reference(reference, settings.limit)
    with _explained(output):
        model = checkpoint.load(settings.dtype, settings.device)
        show(Progress("checking"))
        tokens, phases = reading.tokens, reading.phases
        check_vocabulary(model, tokens)
        weights = weights_digest(model)
        if reference is not None and meant_as_there(reference, settings):
            check_same_model(reference, model, weights, settings.pretrained)
        if meeting.ranks.first and output.resumes:
            check_same_model(open_trace(output.writing), model, weights, settings.pretrained)
        # The longest shows what shorter ones hide: a window, say. What will be generated is not
        # known yet, but any tokens will do.
        longest = max(tokens, key=len)
        most = min(len(longest) + settings.generate, reading.max_length)
        layers = examine(model, np.resize(longest, most))
        recorded = chosen_layers(layers, settings.layers, settings.pretrained)
        projections = examine_projections(model, recorded, longest)
        dtype = dtype_of(layers)
        decoding = check_decoding(
            model, tokens, phases, settings.generate, dtype, reading.max_length
        )
        approximation = None if spec is None else prepare(spec, settings, layers, reference)
        if approximation is not None:
            decodes = settings.generate > 0 or prompts(phases)[0] is not None
            check_loop(model, layers, longest, decoding=decoding if decodes else None)
            check_method(model, layers, approximation, longest, decodes=decodes)
        attributes = describe(settings, checkpoint, model, reading, layers, approximation, weights)
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
                decoding,
                Sampling.of(settings, checkpoint.tokenizer),
                written=open_trace(output.writing) if output.resumes else None,
            )
        select = parse_queries(settings.queries)
        plan = CapturePlan(
            rules={index: layer.rules for index, layer in recorded.items()},
            projections=projections,
            tokens=tokens,
            phases=phases,
            marks=reading.marks,
            query_positions=[select.positions(len(p), prompt_length(p)) for p in phases],
            dtype=dtype,
            attributes=attributes,
            writing=open_trace(output.writing) if output.resumes else None,
        )
        # Caches of sequences of different lengths would need padding: those are read one by one.
        batch_size = 1 if plan.generates else settings.batch_size
        batches = batches_of(model, [len(t) for t in tokens], batch_size, plan.bundle)
        mixed = max(batches, key=lambda batch: np.ptp([len(tokens[s]) for s in batch]))
        if len(mixed) > 1:
            check_batch(model, [tokens[s] for s in mixed], dtype)
        approximator = None if approximation is None else Approximator(approximation, layers)
        return record(model, recorded, plan, batches, decoding, approximator, output, meeting, show)


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
            "The device has too little memory: lower --batch-size or --max-length, or choose "
            "another --dtype or --device."
        ) from error
    except OSError as error:
        explanation = output.explain(error)
        if explanation is None:
            raise
        raise explanation from error
