"""`estimate_capture`: what a capture will store, take and need, before anything is written."""

import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrace.capture.attention.interface import observed_attention
from retrace.capture.attention.recorder import TensorRecorder
from retrace.capture.commands.setup import Ready, load_and_check, read, settle
from retrace.capture.model.loading import quiet_libraries
from retrace.capture.recording.decode import StepRecorder, continue_sequences
from retrace.capture.recording.plan import CapturePlan
from retrace.capture.recording.queue import QUEUE_BYTES
from retrace.capture.recording.record import ShowProgress, batches_of, missing_parts, run_batch
from retrace.capture.recording.sampling import Sampling
from retrace.capture.settings import CaptureSettings
from retrace.traces import PHASES, RemoteLocation, RetraceError, Trace, open_trace
from retrace.traces.output import Output


@dataclass(frozen=True)
class CaptureEstimate:
    """What a capture takes besides what its trace holds already."""

    sequences: int
    """Those that are left to record."""
    tokens: int
    """Of those, with as many generated as there may be."""
    bytes: int
    """Of their queries, keys and values, and of output projections, as the trace will hold them."""
    free_bytes: int | None
    """Room on the disk that the trace goes to; None under a URL."""
    memory: dict[str, int]
    """Most bytes by device: on a GPU what tensors took when the longest batch was read; on the CPU
    this process's resident memory at its highest, and what may wait to be written."""
    preparation: float
    """Seconds that it took to load and check the model, as it will again."""
    seconds: float
    """Expected of the recording after that, as if the disk kept up: by the longest batch, which was
    read without writing. Others are counted by their operations, or by what they decode where that
    is more."""

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def estimate_capture(
    settings: CaptureSettings, progress: ShowProgress | None = None
) -> CaptureEstimate:
    """What `capture` with these settings will take; nothing is written.

    The model is loaded and checked as it will be, and reads one batch, the longest.

    Args:
        settings: of the capture.
        progress: called with a `Progress` when there is some.

    Raises:
        RetraceError: what `capture` raises before it records, or several processes are to do it.
    """
    begun = time.monotonic()
    show = progress or (lambda progress: None)
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(gpu)
    with quiet_libraries():
        asked = settle(settings)
        if asked.ranks.size > 1:
            raise RetraceError("What several processes take is not known here: estimate with one.")
        held = _held(asked.settings)
        ready = load_and_check(asked, *read(asked, show), held, show)
        preparation = time.monotonic() - begun
        plan, generating = _plan(ready, held)
        done = set() if held is None else set(held.sequences)
        lengths = [len(tokens) for tokens in plan.tokens]
        batches = batches_of(ready.model, lengths, ready.batch_size(plan), plan.bundle)
        left = [batch for batch in batches if not done.issuperset(batch)]
        longest = max(left, key=lambda batch: _operations(ready, plan, batch), default=None)
        seconds = 0.0
        if longest is not None:
            measured = _read(ready, plan, longest) + generating
            seconds = measured * sum(_share(ready, plan, batch, longest) for batch in left)
    missing = [s for s in range(len(lengths)) if s not in done]
    return CaptureEstimate(
        len(missing),
        sum(lengths[s] for s in missing),
        plan.bytes() * len(missing) // len(lengths),
        _free(asked.settings),
        _memory(plan),
        preparation,
        seconds,
    )


class _Discarded:
    """A `LayerSink` that copies what it is given to the host, as for writing, and drops it."""

    def write_layer(self, sequence: int, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy one layer's tensors of one sequence."""
        for tensor in tensors.values():
            tensor.to("cpu", copy=True)


def _held(settings: CaptureSettings) -> Trace | None:
    """The interrupted trace that the capture would go on with."""
    path = settings.output()
    if not path.exists():
        return None
    output = Output(path, overwrite=settings.overwrite, resume=settings.resume)
    return open_trace(output.writing) if output.resumes else None


def _plan(ready: Ready, held: Trace | None) -> tuple[CapturePlan, float]:
    """The plan of the trace, and how many seconds it took to generate what its longest sequence
    goes on with. Others are given as many tokens, of no meaning."""
    tokens, phases = list(ready.reading.tokens), list(ready.reading.phases)
    count, seconds = ready.settings.generate, 0.0
    if count:
        growing = [s for s, phase in enumerate(phases) if phase[-1] == PHASES["context"]]
        longest = max(growing, key=lambda s: len(tokens[s]), default=0)
        begun = _now()
        [own], [phase] = continue_sequences(
            ready.model,
            [tokens[longest]],
            [phases[longest]],
            count,
            ready.decoding,
            Sampling.of(ready.settings, ready.checkpoint.tokenizer),
        )
        seconds = _now() - begun
        generated = np.full(count, PHASES["generated"], np.int8)
        for s in growing:
            phases[s] = np.concatenate([phases[s], generated])
            tokens[s] = np.resize(tokens[s], len(phases[s]))
        tokens[longest], phases[longest] = own, phase
    return ready.plan(tokens, phases, {}, held), seconds


def _read(ready: Ready, plan: CapturePlan, batch: range) -> float:
    """Seconds that it takes to record a batch, without writing."""
    recorder_class = StepRecorder if plan.generates else TensorRecorder
    recorder = recorder_class(_Discarded(), ready.recorded)
    approximator = ready.approximator()
    parts = missing_parts(plan, batch, set(), None)
    begun = _now()
    with torch.inference_mode(), observed_attention(ready.model, recorder, approximator):
        run_batch(ready.model, recorder, approximator, plan, batch, ready.decoding, parts)
    return _now() - begun


def _share(ready: Ready, plan: CapturePlan, batch: range, measured: range) -> float:
    """How much longer a batch takes than the one that was measured."""
    share = _operations(ready, plan, batch) / _operations(ready, plan, measured)
    steps = _steps(plan, measured)
    return max(share, _steps(plan, batch) / steps) if steps else share


def _operations(ready: Ready, plan: CapturePlan, batch: range) -> float:
    """Multiplications of the weights and of attention when a batch is read, padding included."""
    rules = [layer.rules for layer in ready.layers.values()]
    attention = sum(one.heads * (one.key_dim + one.value_dim) for one in rules)
    length = max(len(plan.tokens[s]) for s in batch)
    weights = int(ready.model.num_parameters())
    return len(batch) * (length * weights + length**2 / 2 * attention)


def _steps(plan: CapturePlan, sequences: Sequence[int]) -> int:
    """Tokens that are decoded one by one."""
    return sum(int((plan.phases[s] == PHASES["generated"]).sum()) for s in sequences)


def _now() -> float:
    """Seconds, once every GPU has done what it was given."""
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.synchronize(gpu)
    return time.monotonic()


def _memory(plan: CapturePlan) -> dict[str, int]:
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    most = {"cpu": resident + min(QUEUE_BYTES, plan.bytes())}
    for gpu in range(torch.cuda.device_count()):
        used = torch.cuda.max_memory_allocated(gpu)
        if used:
            most[f"cuda:{gpu}"] = used
    return most


def _free(settings: CaptureSettings) -> int | None:
    path = settings.output()
    if isinstance(path, RemoteLocation):
        return None
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
