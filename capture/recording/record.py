"""Recording: the model runs over every sequence, and what its attention sees is stored."""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from retrace.capture.attention.interface import observed_attention
from retrace.capture.attention.recorder import AttentionLayer, RecordedSequence, TensorRecorder
from retrace.capture.checks.runs import check_decoded
from retrace.capture.checks.trace import check_stored, sampled_positions
from retrace.capture.loop.approximate import Approximator
from retrace.capture.loop.exact_runs import ExactRuns
from retrace.capture.model.lengths import LengthDependence
from retrace.capture.model.likelihood import likelihoods
from retrace.capture.model.loading import input_device
from retrace.capture.model.logits import Decoding
from retrace.capture.recording.decode import StepRecorder
from retrace.capture.recording.plan import CapturePlan
from retrace.capture.recording.queue import Figures, WriteQueue
from retrace.capture.recording.ranks import Meeting
from retrace.traces import (
    Location,
    RetraceError,
    Trace,
    TraceWriter,
    UnreachableError,
    bundles_of,
    open_trace,
)
from retrace.traces.output import Output


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


def record(
    model: Any,
    layers: Mapping[int, AttentionLayer],
    plan: CapturePlan,
    batches: Sequence[range],
    decoding: Decoding,
    approximator: Approximator | None,
    output: Output,
    meeting: Meeting,
    show: ShowProgress,
) -> Trace:
    """Run the model over every sequence that the trace does not hold yet, by these batches,
    `decoding` some of them.

    Of several processes the first begins and completes the trace; each records whole batches of
    whole bundles of its own, and computes in each what one process alone would.
    """
    if meeting.ranks.first:
        done = _begin(plan, output)
        writer = plan.open(output)
        meeting.tell("begun", {"writing": str(output.writing), "done": sorted(done)})
    else:
        done = set(meeting.hear("begun")["done"])
        writer = plan.open(output)
    show(_progress(plan, done))
    pending = [
        share
        for share in shares_of(batches, plan.bundle)
        if not all(done.issuperset(batch) for batch in share)
    ]
    ours = pending[meeting.ranks.rank :: meeting.ranks.size]
    try:
        _record_shares(
            model, layers, plan, ours, decoding, approximator, done, writer, meeting, show
        )
    except UnreachableError:
        raise  # what is there cannot be told
    except RetraceError:
        alone = meeting.ranks.size == 1
        if alone and not output.resumes and not open_trace(output.writing).sequences:
            output.discard()
        raise
    if meeting.ranks.first:
        _wait_for_others(plan, done, output, meeting, show)
        writer.close()
        output.complete()
        meeting.tell("complete")
    else:
        meeting.tell(f"written {meeting.ranks.rank}")
        meeting.hear("complete")
    return open_trace(output.path)


def _begin(plan: CapturePlan, output: Output) -> set[int]:
    """Make room for the trace; the sequences that it holds already."""
    if not output.resumes:
        output.clear()
    done = set(open_trace(output.writing).sequences) if output.resumes else set()
    count = len(plan.tokens)
    output.check_space(plan.bytes() * (count - len(done)) // count)
    return done


def _record_shares(
    model: Any,
    layers: Mapping[int, AttentionLayer],
    plan: CapturePlan,
    shares: Sequence[Sequence[range]],
    decoding: Decoding,
    approximator: Approximator | None,
    done: set[int],
    writer: TraceWriter,
    meeting: Meeting,
    show: ShowProgress,
) -> None:
    """Record shares, each written while the next is computed; what is written joins `done`."""
    recorder_class = StepRecorder if plan.generates else TensorRecorder
    with (
        WriteQueue(writer) as queue,
        torch.inference_mode(),
        observed_attention(model, recorder := recorder_class(queue, layers), approximator),
    ):
        before: list[int] = []
        unchecked = plan.generates and approximator is None
        # What a method answered is not what the trace explains by exact attention.
        to_check = layers if approximator is None else None
        for share in shares:
            finished: list[tuple[int, Figures, Figures | None]] = []
            check: Callable[[], None] | None = None
            for batch in share:
                meeting.check()
                # A batch is run again as it was though some of it be done: results must not
                # depend, by a rounding, on where a capture was interrupted.
                parts = missing_parts(plan, batch, done, to_check)
                if not parts:
                    continue
                nll, kl = run_batch(model, recorder, approximator, plan, batch, decoding, parts)
                if to_check is not None:
                    check = partial(_check_first, writer.path, parts[0], recorder.samples)
                    to_check = None
                prompt, own = plan.prompt(batch[0]), plan.tokens[batch[0]]
                if unchecked and prompt is not None and prompt < len(own):
                    check_decoded(model, own, nll[0], prompt, plan.dtype)
                    unchecked = False
                for part in parts:
                    place = part.row, slice(part.length)
                    finished.append((part.sequence, nll[place], None if kl is None else kl[place]))
            if before:
                queue.wait_for(before)
                done.update(before)
                show(_progress(plan, done))
            elif check is not None:
                queue.drain()
                check()
            for figures in finished:
                queue.finish_sequence(*figures)
            before = [sequence for sequence, *_ in finished]
        queue.wait_for(before)
        done.update(before)
    if shares:
        show(_progress(plan, done))


def _wait_for_others(
    plan: CapturePlan, done: set[int], output: Output, meeting: Meeting, show: ShowProgress
) -> None:
    """Wait until the other processes have written their share."""
    while len(done) < len(plan.tokens):
        meeting.pause(progress=len(done))
        done = set(open_trace(output.writing).sequences)
        show(_progress(plan, done))
    for rank in range(1, meeting.ranks.size):
        meeting.hear(f"written {rank}")


def batches_of(model: Any, lengths: Sequence[int], size: int, bundle: int) -> list[range]:
    """Consecutive sequences of these lengths, up to `size` together: those to which the model
    gives the same rotary frequencies, which it chooses by the longest of a batch. A batch is whole
    bundles or within one, but for the last: a share is then no more than one of either."""
    frequencies = LengthDependence.of(model.config.get_text_config()).frequencies
    batches: list[range] = []
    kinds: list[Any] = []
    for some in bundles_of(len(lengths), bundle):
        for kind, alike in itertools.groupby(some, lambda s: frequencies(lengths[s])):
            run = list(alike)
            for start in range(run[0], run[-1] + 1, size):
                batch = range(start, min(start + size, run[-1] + 1))
                if kinds and kinds[-1] == kind and len(batches[-1]) + len(batch) <= size:
                    batches[-1] = range(batches[-1].start, batch.stop)
                else:
                    batches.append(batch)
                    kinds.append(kind)
    return batches


def shares_of(batches: Sequence[range], bundle: int) -> list[list[range]]:
    """Consecutive batches that are whole bundles together: what one process records."""
    shares: list[list[range]] = [[]]
    for batch in batches:
        if shares[-1] and shares[-1][-1].stop % bundle == 0:
            shares.append([])
        shares[-1].append(batch)
    return shares


def missing_parts(
    plan: CapturePlan,
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


def run_batch(
    model: Any,
    recorder: TensorRecorder,
    approximator: Approximator | None,
    plan: CapturePlan,
    batch: range,
    decoding: Decoding,
    parts: Sequence[RecordedSequence],
) -> tuple[Figures, Figures | None]:
    """Record one batch; its negative log-likelihoods (batch, positions), and the divergences of a
    run with a method in the loop."""
    lengths = [len(plan.tokens[s]) for s in batch]
    # Padding on the right needs no mask: no position sees a later one. Any token will do.
    tokens = np.zeros((len(batch), max(lengths)), np.int64)
    for row, s in enumerate(batch):
        tokens[row, : lengths[row]] = plan.tokens[s]
    prompt = plan.prompt(batch[0])
    ids = torch.from_numpy(tokens).to(input_device(model))
    beside: AbstractContextManager[Any] = contextlib.nullcontext()
    if approximator is not None:
        beside = ExactRuns(model).of(batch[0], ids, prompt, decoding)
    with beside as exactly:
        recorder.start(parts)
        if approximator is not None:
            approximator.start(batch, prompt)
        nll, kl = likelihoods(model, ids, prompt, exactly, decoding=decoding)
    recorder.finish()
    for row, length in enumerate(lengths):
        for figures in (nll, kl):
            if figures is not None:
                figures[row, length - 1 :] = torch.nan
    for part in parts:
        if not bool(torch.isfinite(nll[part.row, : part.length - 1]).all()):
            raise RetraceError(
                f"The model's likelihoods are not finite in sequence {part.sequence}: try another "
                "--dtype."
            )
    return nll.numpy(), None if kl is None else kl.numpy()


def _check_first(
    path: Location, part: RecordedSequence, outputs: Mapping[int, npt.NDArray[np.float64]]
) -> None:
    assert part.sampled_positions is not None
    check_stored(open_trace(path), part.sequence, part.sampled_positions, outputs)


def _progress(plan: CapturePlan, done: set[int]) -> Progress:
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
