"""Decoding: continuing sequences, and recording what each step's attention saw."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrace.capture.attention.interface import AttentionCall
from retrace.capture.attention.passes import (
    Pass,
    Row,
    added_choices,
    added_tensors,
    attends_as_ruled,
)
from retrace.capture.attention.recorder import AttentionLayer, RecordedSequence, TensorRecorder
from retrace.capture.attention.selected import joined_choices
from retrace.capture.model.loading import input_device
from retrace.capture.model.logits import CachedRun, Decoding
from retrace.capture.recording.sampling import Sampling, Writer
from retrace.traces import PHASES, RetraceError, Trace

Tokens = npt.NDArray[np.int32]
Phases = npt.NDArray[np.int8]


def continue_sequences(
    model: Any,
    tokens: Sequence[Tokens],
    phases: Sequence[Phases],
    count: int,
    decoding: Decoding,
    sampling: Sampling,
    *,
    written: Trace | None = None,
) -> tuple[list[Tokens], list[Phases]]:
    """Sequences continued by `count` tokens each, fewer where the model ends them, and the phases
    of the longer ones. Sequences that end with scored text stay as they are.

    All is generated before anything is recorded, since a trace holds its tokens from the start. A
    capture that is resumed goes on with the tokens that its trace has `written`.

    Args:
        model: a causal language model.
        tokens: token ids (positions,) of each sequence.
        phases: what each position (positions,) of each sequence is.
        count: how many tokens to generate.
        decoding: how the model goes on with what it has read.
        sampling: how tokens are chosen, and what ends a sequence besides the model's own tokens.
        written: the interrupted trace to go on with.
    """
    longer, marked = [], []
    ends = end_tokens(model)
    for sequence, (prompt, phase) in enumerate(zip(tokens, phases, strict=True)):
        more = np.empty(0, np.int32)
        if phase[-1] == PHASES["context"]:
            known = _written(written, sequence, prompt)
            if known is None:
                writer = sampling.of_sequence(sequence)
                known = _continue(model, prompt, count, decoding, ends, writer)
            more = known
        longer.append(np.concatenate([prompt, more]))
        marked.append(np.concatenate([phase, np.full(len(more), PHASES["generated"], np.int8)]))
    if len(longer) == len(tokens) and all(map(np.array_equal, longer, tokens)):
        raise RetraceError(
            "There is nothing to generate: these tasks only score given text. Leave out generate, "
            "or name a text or a task that asks for text."
        )
    return longer, marked


def _written(trace: Trace | None, sequence: int, prompt: Tokens) -> Tokens | None:
    """What an interrupted trace holds after the prompt (generated,); None where it differs."""
    if trace is None or sequence >= trace.planned:
        return None
    tokens, phase = trace.tokens(sequence), trace.phase(sequence)
    generated = phase == PHASES["generated"]
    if not generated.any() or not np.array_equal(tokens[~generated], prompt):
        return None
    known: Tokens = tokens[generated]
    return known


def _continue(
    model: Any, prompt: Tokens, count: int, decoding: Decoding, ends: set[int], writer: Writer
) -> Tokens:
    """The next tokens (generated,) by the writer's choice, up to `count` or to where the text ends
    by one of the tokens in `ends` or as the writer says."""
    generated: list[int] = []
    run = CachedRun(model, decoding)
    device = input_device(model)
    batch = torch.from_numpy(prompt).long()[None].to(device)
    with torch.inference_mode():
        last = torch.tensor([len(prompt) - 1])  # on the CPU, from where it indexes any device
        logits = next(run.read(batch, [last]))
        while True:
            generated.append(writer.choose(logits[0, -1]))
            if len(generated) == count or generated[-1] in ends or writer.ended(generated):
                return np.array(generated, np.int32)
            logits = run.go_on(torch.tensor([generated[-1:]], device=device))


def end_tokens(model: Any) -> set[int]:
    """The tokens that end a text."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        end = getattr(config, "eos_token_id", None)
        if end is not None:
            return set(end) if isinstance(end, list | tuple) else {int(end)}
    return set()


class StepRecorder(TensorRecorder):
    """Stores a sequence whose end is decoded token by token, each layer when the last token is.

    A layer's first call holds the prompt; each later one a query, and the keys and values that the
    cache holds for it, of which the last are its own. Each is kept once. All layers of one sequence
    are held on the CPU meanwhile.
    """

    def start(self, batch: Sequence[RecordedSequence]) -> None:
        """What the next forward passes hold: one sequence."""
        super().start(batch)
        self._calls: dict[torch.nn.Module, list[AttentionCall]] = {}
        self._lengths: dict[torch.nn.Module, int] = {}

    def __call__(self, call: AttentionCall) -> None:
        """Keep what a call adds to its layer."""
        layer = self._layers.get(call.module)
        if layer is None:
            return
        before = self._lengths.get(call.module, 0)
        count = call.query.shape[-2]
        if before and count != 1:
            raise RetraceError(f"{call.path} called attention twice for a sequence.")
        one = Pass(before, count, [Row(self._batch[0].sequence, np.ones(before + count, bool))])
        if before == 0:
            self._check(call, layer.rules)
        elif not attends_as_ruled(call, one, layer.rules):
            raise RetraceError(
                f"{call.path} has other keys in its cache than its queries see by the rules of the "
                "trace: capture this model without generate."
            )
        self._lengths[call.module] = before + count
        query, key, value, output = added_tensors(call, one, 0)
        chosen = added_choices(call, one, 0)
        added = replace(
            call,
            # Copies, since a view of the last keys would keep all of them.
            query=_copy(query[None]),
            key=_copy(key[None]),
            value=_copy(value[None]),
            output=_copy(output[None]),
            selected=None if chosen is None else _copy(chosen[None]),
            mask=None,
        )
        self._calls.setdefault(call.module, []).append(added)

    def finish(self) -> None:
        """Store every layer of the sequence."""
        for module, calls in self._calls.items():
            layer: AttentionLayer = self._layers[module]
            joined = replace(
                calls[0],
                query=torch.cat([call.query for call in calls], dim=2),
                key=torch.cat([call.key for call in calls], dim=2),
                value=torch.cat([call.value for call in calls], dim=2),
                output=torch.cat([call.output for call in calls], dim=1),
                selected=joined_choices(
                    [call.selected for call in calls if call.selected is not None]
                ),
            )
            self._recorded.add(layer.index)
            self._store(joined, layer)
        self._calls = {}
        super().finish()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
